"""Compile every kernel of the fused attention for cards that need not be there, and print what each one takes.

    python scripts/compile_fused.py [--windows 8 12 24 8x16x16] [--head-dim 32] [--dtype bfloat16] [--capability 80 90]

Triton brings NVIDIA's assembler along, so this runs without a GPU and finds what Triton's interpreter lets pass.  The
launches are those of models/kernels/dispatch.py itself, recorded instead of carried out.  "spilled" is the stack in
bytes per thread; "warps" how many fit on one multiprocessor at a time, by registers and shared memory.  "interior"
and "all code" are warp instructions per 32 scores: of the main loop per score of its tile, and of whole programs per
score of the window, with what tiles have beyond it, what comes before and after the loop, and every pass over it; both
on the way that windows take which are not at the map's edge (scripts/sass_counts.py).
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
from typing import Any, NamedTuple

import torch
from sass_counts import blocks_of, disassembly, fewest_instructions, marginal_instructions

from swinv2_train.models.kernels import dispatch
from swinv2_train.models.windows import num_offsets, window_grid

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
SHARED_KIB = {80: 163, 90: 227}  # that one program may have
REGISTERS = 65536
# Matrix products over the head dim that a kernel makes of a score; three more where it does the whole backward pass.
PRODUCTS = {"forward": 2, "query gradient": 3, "key value gradient": 4, "table gradient": 2, "offset gradient": 2}


class Recorder:
    """Stands for a kernel: kernel[programs](*args, **kwargs) writes the launch down."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, programs: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def launches_of(window: tuple[int, ...], head_dim: int, dtype: torch.dtype, padded: bool, capability: int) -> list[Any]:
    """The launches of one forward and backward pass over two shifted windows per axis with two heads.

    window: (rows, cols), of a clip (frames, rows, cols)."""
    grid = window_grid(tuple(2 * length - int(padded) for length in window), window, shifted=True)
    launches: list[Any] = []
    originals = dispatch._kernels, dispatch._compiled, dispatch._capability
    recorders = tuple(
        SimpleNamespace(**{name: Recorder(f, launches) for name, f in vars(module).items() if name.endswith("_kernel")})
        for module in dispatch._kernels()
    )
    dispatch._kernels = lambda: recorders  # type: ignore[assignment, return-value]
    dispatch._compiled = lambda qkv: False  # not the kernel for CPUs
    dispatch._capability = lambda device: capability // 10
    try:
        qkv = torch.zeros(1, *grid.size, 3 * 2 * head_dim, dtype=dtype, requires_grad=True)
        table = torch.zeros(num_offsets(grid.window), 2)
        out = dispatch.fused_window_attention(qkv, torch.ones(2, 1, 1), table, grid, 2)
        out.sum().backward()
    finally:
        dispatch._kernels, dispatch._compiled, dispatch._capability = originals
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


class Counts(NamedTuple):
    """Warp instructions per 32 scores."""

    interior: float  # of the main loop, per score of the tile; of a whole program where the code has no loop
    all_code: float  # of whole programs, per score of the window


def counts(name: str, cubin: bytes, kwargs: dict[str, Any], head_dim: int) -> Counts | None:
    """None for kernels that do not multiply, and for float32, which has no matrix instructions to count by."""
    if name not in PRODUCTS:
        return None
    blocks = blocks_of(disassembly(cubin))
    in_code = sum(block.macs for block in blocks)
    if not in_code:
        return None
    warps, tokens = kwargs["num_warps"], kwargs["FRAMES"] * kwargs["ROWS"] * kwargs["COLS"]
    products = (PRODUCTS[name] + 3 * bool(kwargs.get("WHOLE"))) * head_dim
    scores = tokens * tokens

    def issued(rows: int, cols: int, loop: bool) -> float:
        macs = rows * cols * products // warps
        if loop:
            return warps * (marginal_instructions(blocks, macs) or 0.0)
        try:
            return warps * fewest_instructions(blocks, macs)
        except ValueError:  # the compiler has left out products with what it knows to be padding
            return warps * fewest_instructions(blocks, min(macs, in_code))

    if name.startswith(("table", "offset")):  # a program loops over windows, and over pairs of groups of rows
        side = kwargs["BLOCK"]
        products = min(products, in_code * warps // side**2)  # the compiler leaves out those with padding it knows of
        whole, rest = divmod(tokens, side)
        if "GROUP" in kwargs and not kwargs.get("WHOLE"):
            whole, rest = kwargs["FRAMES"] * -(-kwargs["ROWS"] // kwargs["GROUP"]), 0
        elif rest and kwargs.get("TAIL", side) == side:
            whole, rest = whole + 1, 0
        everything = whole * whole * issued(side, side, True)
        if rest:
            edge = kwargs["TAIL"]
            everything += whole * (issued(side, edge, True) + issued(edge, side, True)) + issued(side, edge, True)
        return Counts(issued(side, side, True) * 32 / side**2, everything * 32 / scores)
    owned, streamed = ("K", "Q") if name.startswith("key") else ("Q", "K")
    block, step = kwargs[f"BLOCK_{owned}"], kwargs[f"BLOCK_{streamed}"]
    covered = tokens // step * step + (kwargs.get(f"TAIL_{streamed}", step) if tokens % step else 0)
    edge = kwargs.get(f"TAIL_{owned}", block)
    everything = tokens // block * issued(block, covered, False) if tokens >= block else 0.0
    if tokens % block:
        everything += issued(edge, covered, False)
    interior = issued(block, step, True) * 32 / (block * step) or everything * 32 / scores
    return Counts(interior, everything * 32 / scores)


def axes_of(window: str) -> tuple[int, ...]:
    """(rows, cols) or (frames, rows, cols) of what --windows was given."""
    axes = tuple(map(int, window.split("x")))
    return axes * 2 if len(axes) == 1 else axes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--windows",
        nargs="+",
        default=["8", "12", "16", "24", "32"],
        metavar="SIDE|ROWSxCOLS|FRAMESxROWSxCOLS",
        help="8 is 8x8",
    )
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
    print("| capability | window | kernel | registers | spilled | shared memory, KiB | warps | interior | all code |")
    print("|---|---|---|---|---|---|---|---|---|")
    for capability in options.capability:
        for window in options.windows:
            for kernel, args, kwargs in launches_of(
                axes_of(window), options.head_dim, getattr(torch, options.dtype), options.padded, capability
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
                found = counts(name, compiled.asm["cubin"], kwargs, options.head_dim)
                issued = f"{found.interior:.1f} | {found.all_code:.1f}" if found else "- | -"
                print(
                    f"| {capability / 10} | {window} | {name} | {registers} | {stack} | {shared:.1f} | "
                    f"{min(64, programs * threads // 32)} | {issued} |",
                    flush=True,
                )
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main())
