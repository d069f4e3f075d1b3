"""Peak memory of one attention layer, forward and backward, batched and in chunks.

Two measures.  "counted": the bytes of tensors alive together, on the meta device, where nothing is computed.
"resident": how far the resident set of a fresh process rises above what it was before the pass (Linux; each setting has
a process of its own, whose allocator gives memory back at once).  Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.sequential import Chunks
from swinv2_train.models.windows import window_grid
from tests.support.live_bytes import LiveBytes

HEAD_DIM = 32
MIB = 2**20


def attention(heads: int, window: int, chunk: int) -> WindowAttention:
    """chunk: windows at a time; 0 = all at once."""
    chunks = Chunks(chunk, 1.0) if chunk else None
    return WindowAttention(HEAD_DIM * heads, heads, (window, window), chunks=chunks)


def forward_backward(layer: WindowAttention, map_side: int, window: int, device: str, dtype: torch.dtype) -> None:
    x = torch.randn(1, map_side, map_side, layer.qkv.in_features, device=device, dtype=dtype, requires_grad=True)
    grid = window_grid((map_side, map_side), (window, window), True)
    layer(x, grid).sum().backward()


def counted(heads: int, map_side: int, window: int, chunk: int, dtype: torch.dtype) -> float:
    """MiB of tensors alive together, at most."""
    with torch.device("meta"):
        layer = attention(heads, window, chunk).to(dtype)
    with LiveBytes() as live:
        forward_backward(layer, map_side, window, "meta", dtype)
    return live.peak / MIB


def resident_of_this_process(
    heads: int, map_side: int, window: int, chunk: int, dtype: torch.dtype
) -> tuple[float, float]:
    """MiB by which the resident set rises at most, and CPU seconds; a small pass first pays for what is loaded once."""
    torch.set_num_threads(1)
    layer = attention(heads, window, chunk).to(dtype)
    forward_backward(layer, 2 * window, window, "cpu", dtype)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    start = time.process_time()
    forward_backward(layer, map_side, window, "cpu", dtype)
    return _status("VmHWM") - before, time.process_time() - start


def _status(name: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


def resident(*setting: object) -> list[str]:
    """resident_of_this_process() in a process of its own, as text."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", *(str(value) for value in setting)]
    mib, seconds = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    return [f"{float(mib):.0f}", f"{float(seconds):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--map-sides", type=int, nargs="+", default=[64, 128, 256], help="tokens")
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 1, 4, 16, 64], help="windows; 0 = batched")
    parser.add_argument("--counted-only", action="store_true")
    parser.add_argument("--one", nargs=4, metavar=("HEADS", "MAP_SIDE", "WINDOW", "CHUNK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if arguments.one:
        print(*resident_of_this_process(*(int(value) for value in arguments.one), dtype))
        return
    heads, window = arguments.heads, arguments.window
    square = heads * window**4 * 4 / MIB
    print(f"{heads} heads of {HEAD_DIM}, window {window}, {arguments.dtype}, batch 1, shifted")
    print(f"one window's h x N x N in float32: {square:.2f} MiB\n")
    print("| map, tokens | windows | chunk | counted, MiB | of it not rows of the map | resident, MiB | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for side in arguments.map_sides:
        rows = 8 * side**2 * heads * HEAD_DIM * dtype.itemsize / MIB  # input, qkv and their gradients: 8 C per token
        for chunk in arguments.chunks:
            total = counted(heads, side, window, chunk, dtype)
            setting = (heads, side, window, chunk, "--dtype", arguments.dtype)
            measured = ["-", "-"] if arguments.counted_only else resident(*setting)
            cells = [
                f"{side} x {side}",
                (side // window) ** 2,
                chunk or "batched",
                f"{total:.0f}",
                f"{total - rows:.0f}",
            ]
            print(f"| {' | '.join(str(cell) for cell in [*cells, *measured])} |")


if __name__ == "__main__":
    main()
