"""The window attention in C++ as ARM's compiler makes it (NEON), in an emulator: the numbers of the reference.

The passes are compiled with it, and not run.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from swinv2_train.models.cosine import window_attention
from swinv2_train.models.kernels import cpu_attention
from swinv2_train.models.windows import window_grid
from tests.unit.models.kernels.test_cpu_attention import errors, inputs, run

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"{COMPILER} and {EMULATOR} are not both here (Debian: g++-aarch64-linux-gnu and qemu-user)",
    ),
]
PROGRAM = """
#include <cstdio>

#include "cpu_attention.cpp"

// A length in bytes, and so many bytes.
std::vector<char> given() {
  int64_t length = 0;
  if (fread(&length, sizeof length, 1, stdin) != 1) return {};
  std::vector<char> bytes(length);
  if (fread(bytes.data(), 1, length, stdin) != size_t(length)) return {};
  return bytes;
}

int main() {
  const std::vector<char> sizes = given(), qkv = given(), scale = given(), table = given(), tokens = given(),
                          regions = given(), grad = given();
  const Sizes& s = *reinterpret_cast<const Sizes*>(sizes.data());
  const float *scales = (const float*)scale.data(), *biases = (const float*)table.data();
  const int64_t* places = (const int64_t*)tokens.data();
  const int8_t* parts = (const int8_t*)regions.data();
  const long length = s.frames * s.rows * s.cols;
  std::vector<char> out(grad.size()), grad_qkv(qkv.size());
  std::vector<float> lse(s.batch * s.windows * s.heads * length), grad_scale(s.chunks * s.heads),
      grad_table(s.chunks * table.size() / sizeof(float));
  const int bfloat16 = qkv.size() == 2 * size_t(s.batch * s.map * 3 * s.heads * s.dim);
  window_attention_forward(bfloat16, &s, qkv.data(), scales, biases, places, parts, out.data(), lse.data(), nullptr, 2);
  window_attention_backward(bfloat16, &s, qkv.data(), scales, biases, places, parts, grad.data(), lse.data(),
                            grad_qkv.data(), grad_scale.data(), grad_table.data(), nullptr, nullptr, 2);
  fwrite(out.data(), 1, out.size(), stdout);
  fwrite(grad_qkv.data(), 1, grad_qkv.size(), stdout);
  fwrite(grad_scale.data(), sizeof(float), grad_scale.size(), stdout);
  fwrite(grad_table.data(), sizeof(float), grad_table.size(), stdout);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The kernel with a main that reads a call's arrays and writes what comes out, for ARM."""
    folder = tmp_path_factory.mktemp("arm")
    (folder / "main.cpp").write_text(PROGRAM)
    flags = [flag for flag in cpu_attention.FLAGS if flag not in ("-march=native", "-shared", "-fPIC")]
    passes = [path for path in cpu_attention.SOURCES[1:] if path.suffix == ".cpp"]
    command = [COMPILER, *flags, "-static", f"-I{cpu_attention.SOURCES[0].parent}", "-o", "main", "main.cpp", *passes]
    subprocess.run(command, cwd=folder, check=True, timeout=cpu_attention.COMPILE_SEC)
    return folder / "main"


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "window", "shifted", "heads", "dim"),
    [((16, 16), (8, 8), True, 3, 32), ((13, 17), (5, 7), True, 2, 24), ((5, 6, 4), (2, 6, 4), True, 3, 5)],
)
def test_outputs_and_gradients_on_arm_are_those_of_the_reference(program, dtype, size, window, shifted, heads, dim):
    """Within what test_cpu_attention.py allows this machine's kernel."""
    grid = window_grid(size, window, shifted)
    qkv, scale, table, grad = inputs(grid, heads, dim, dtype=dtype)
    call = cpu_attention._Call(qkv, scale, table, None, grid, heads)
    arrays = [bytes(call.arguments[1]._obj), *map(raw, (*call.tensors, grad))]
    sent = b"".join(struct.pack("<q", len(each)) + each for each in arrays)
    told = subprocess.run([EMULATOR, program], input=sent, stdout=subprocess.PIPE, check=True, timeout=300).stdout
    found, at = [], 0
    for shape, kind in (
        (grad.shape, dtype), (qkv.shape, dtype), ((call.chunks, heads, 1, 1), torch.float32),
        ((call.chunks, *call.table.shape), torch.float32),
    ):  # fmt: skip
        empty = torch.empty(shape, dtype=kind)
        found.append(torch.frombuffer(bytearray(told[at : at + empty.nbytes]), dtype=kind).view(shape))
        at += empty.nbytes
    assert at == len(told)
    out, d_qkv, d_scale, d_table = errors(
        [found[0], found[1], found[2].sum(0), found[3].sum(0).t()],
        run(window_attention, *(x.double() for x in (qkv, scale, table, grad)), grid, heads),
    )
    assert max(out, d_qkv, d_table) <= (3e-5 if dtype == torch.float32 else 2**-7)
    assert d_scale <= (1e-3 if dtype == torch.float32 else 2**-6)
