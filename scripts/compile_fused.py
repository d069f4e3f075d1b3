"""Compile every kernel of the fused attention for cards that need not be there, and print what each one takes.

    python scripts/compile_fused.py [--windows 8 12 16 24 32] [--head-dim 32] [--dtype bfloat16] [--capability 80 90]

Triton brings NVIDIA's assembler along, so this runs without a GPU and finds what Triton's interpreter lets pass.  The
launches are those of models/kernels/dispatch.py itself, recorded instead of carried out.  "spilled" is the stack in
bytes per thread; "warps" how many fit on one multiprocessor at a time, by registers and shared memory.
Exit code 1 where a kernel needs more shared memory than the card has.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from swinv2_train.models.kernels import dispatch
from swinv2_train.models.windows import window_grid

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
SHARED_KIB = {80: 163, 90: 227}  # that one program may have
REGISTERS = 65536


class Recorder:
    """Stands for a kernel: kernel[programs](*args, **kwargs) writes the launch down."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, programs: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def launches_of(window: int, head_dim: int, dtype: torch.dtype, padded: bool) -> list[Any]:
    """The launches of one forward and backward pass over 2 x 2 shifted windows with two heads."""
    side = 2 * window - int(padded)
    grid = window_grid((side, side), (window, window), shifted=True)
    launches: list[Any] = []
    originals = dispatch._kernels, dispatch._compiled
    recorders = tuple(
        SimpleNamespace(**{name: Recorder(f, launches) for name, f in vars(module).items() if name.endswith("_kernel")})
        for module in dispatch._kernels()
    )
    dispatch._kernels = lambda: recorders  # type: ignore[assignment, return-value]
    dispatch._compiled = lambda qkv: False  # not the kernel for CPUs
    try:
        qkv = torch.zeros(1, side, side, 3 * 2 * head_dim, dtype=dtype, requires_grad=True)
        out = dispatch.fused_window_attention(qkv, torch.ones(2, 1, 1), torch.zeros((2 * window - 1) ** 2, 2), grid, 2)
        out.sum().backward()
    finally:
        dispatch._kernels, dispatch._compiled = originals
    return launches


def compile_launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> Any:
    """Triton's compiled kernel: machine code in asm["cubin"], shared memory in metadata.shared."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    signature, constants, aligned = {}, {}, {}
    given = dict(zip((p.name for p in kernel.params), args, strict=False)) | kwargs
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], aligned[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", text)[0]
    return int(registers), int(stack)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 12, 16, 24, 32])
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument(
        "--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in POINTERS], default="bfloat16"
    )
    parser.add_argument("--capability", type=int, nargs="+", choices=sorted(SHARED_KIB), default=sorted(SHARED_KIB))
    parser.add_argument("--padded", action="store_true", help="a map that windows do not divide")
    options = parser.parse_args()
    if not dispatch.HAS_TRITON:
        print("compile_fused needs the package triton", file=sys.stderr)
        return 2
    too_large = False
    print("| capability | window | kernel | registers | spilled | shared memory, KiB | warps |")
    print("|---|---|---|---|---|---|---|")
    for capability in options.capability:
        for window in options.windows:
            for kernel, args, kwargs in launches_of(
                window, options.head_dim, getattr(torch, options.dtype), options.padded
            ):
                threads = 32 * kwargs["num_warps"]
                compiled = compile_launch(kernel, args, dict(kwargs), capability)
                registers, stack = resources(compiled)
                shared = compiled.metadata.shared / 1024
                programs = min(
                    REGISTERS // (threads * (-(-registers // 8) * 8)), int(SHARED_KIB[capability] / (shared + 1))
                )
                too_large |= shared > SHARED_KIB[capability]
                name = kernel.__name__.removesuffix("_kernel").replace("_", " ")
                print(
                    f"| {capability / 10} | {window} | {name} | {registers} | {stack} | {shared:.1f} | "
                    f"{min(64, programs * threads // 32)} |",
                    flush=True,
                )
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main())
