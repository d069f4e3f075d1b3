"""One window attention layer, forward and backward: the fused kernels beside the eager path and torch's attentions.

    python benchmarks/attention_layer.py [--windows 8 12 16 24 32] [--tokens 147456] [--dim 512] [--dtype bfloat16]

A layer is the projection to q, k, v, shifted windowed cosine attention and the projection back; all variants share
weights and inputs.  "eager" restates the official arithmetic (roll, cut, normalise, N x N scores, bias and mask,
softmax, and all the way back); "stock" hands the normalised windows and one additive tensor to
scaled_dot_product_attention; "flex" has bias and mask in the score_mod of a compiled flex_attention.

Before anything is timed, output and all gradients of one image are compared with the eager path in float64, each
variant by its own bound: stock rounds the bias to its dtype.  The variants take turns, and what counts is the median.
Peak memory is what one forward and backward pass allocates above weights and inputs.  A variant that fails, for memory
or otherwise, is told in its row.  Prints a Markdown table; exit code 1 where the fused kernels fail or are out of their
bound, 2 without CUDA.  --profile instead runs one fused pass per window between cudaProfilerStart and Stop, for
ncu --profile-from-start off.  --device cpu is for trying the command: its times say nothing of a card.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file

import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.models.kernels.dispatch import HAS_TRITON, fused_available, fused_window_attention
from swinv2_train.models.precision import at_least_float32
from swinv2_train.models.windows import WindowGrid, attention_mask, relative_position_index

HEAD_DIM = 32
Layer = Callable[[Tensor, Tensor, Tensor, WindowGrid, int], Tensor]


def cut(x: Tensor, grid: WindowGrid) -> Tensor:
    """(B, H, W, C) -> (B*nW, N, C), as the official code does it: a roll, then a copy."""
    batch, height, width, channels = x.shape
    rows, cols = grid.window
    x = torch.roll(x, (-grid.shift[0], -grid.shift[1]), (1, 2))
    x = x.view(batch, height // rows, rows, width // cols, cols, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * cols, channels)


def join(windows: Tensor, grid: WindowGrid) -> Tensor:
    height, width = grid.size
    rows, cols = grid.window
    x = windows.view(-1, height // rows, width // cols, rows, cols, windows.shape[-1])
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, windows.shape[-1])
    return torch.roll(x, grid.shift, (1, 2))


def heads_of(qkv: Tensor, grid: WindowGrid, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k of length 1, and v, (B*nW, h, N, d) each."""
    windows = cut(qkv, grid)
    q, k, v = windows.view(*windows.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = (F.normalize(at_least_float32(x), dim=-1).to(x.dtype) for x in (q, k))
    return q, k, v


def position_bias(table: Tensor, grid: WindowGrid) -> Tensor:
    index = relative_position_index(grid.window, table.device)
    return table[index.flatten()].t().reshape(-1, *index.shape)  # (h, N, N)


def eager(qkv: Tensor, scale: Tensor, table: Tensor, grid: WindowGrid, heads: int) -> Tensor:
    q, k, v = heads_of(qkv, grid, heads)
    logits = (q @ k.transpose(-2, -1)) * scale + position_bias(table, grid)
    mask = attention_mask(grid, qkv.device)
    logits = (logits.view(-1, len(mask), *logits.shape[1:]) + mask[:, None]).view(logits.shape)
    out = logits.softmax(-1).to(v.dtype) @ v
    return join(out.transpose(1, 2).flatten(2), grid)


def stock(qkv: Tensor, scale: Tensor, table: Tensor, grid: WindowGrid, heads: int) -> Tensor:
    q, k, v = heads_of(qkv, grid, heads)
    mask = attention_mask(grid, qkv.device)
    additive = (position_bias(table, grid) + mask[:, None]).to(q.dtype)  # (nW, h, N, N)
    count = len(q) // len(mask)
    additive = additive.expand(count, *additive.shape).flatten(0, 1)
    out = F.scaled_dot_product_attention((q * scale).to(q.dtype), k, v, attn_mask=additive, scale=1.0)
    return join(out.transpose(1, 2).flatten(2), grid)


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


def flex(qkv: Tensor, scale: Tensor, table: Tensor, grid: WindowGrid, heads: int) -> Tensor:
    q, k, v = heads_of(qkv, grid, heads)
    mask, bias = attention_mask(grid, qkv.device), position_bias(table, grid)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[h, query, key] + mask[b % len(mask), query, key]

    out = compiled_flex()((q * scale).to(q.dtype), k, v, score_mod=score_mod, scale=1.0)
    return join(out.transpose(1, 2).flatten(2), grid)


VARIANTS: dict[str, Layer] = {"eager": eager, "stock": stock, "flex": flex, "fused": fused_window_attention}
BOUNDS = {  # of the relative errors to float64, root mean squares, of output and gradients
    "bfloat16": {"eager": 3e-2, "stock": 8e-2, "flex": 3e-2, "fused": 3e-2},
    "float16": {"eager": 5e-3, "stock": 2e-2, "flex": 5e-3, "fused": 5e-3},
    "float32": dict.fromkeys(VARIANTS, 1e-4),
}


class Case:
    """Weights and inputs of one layer, and a forward and backward pass through it."""

    def __init__(self, window: int, tokens: int, dim: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        side = 4 * window  # 16 windows per image
        batch = max(1, tokens // side**2)
        self.grid = WindowGrid((side, side), (window, window), (window // 2, window // 2))
        self.heads = dim // HEAD_DIM
        with torch.device(device):
            to_qkv, back = ((torch.randn(n * dim, dim) / dim**0.5).to(dtype) for n in (3, 1))
            scale = torch.full((self.heads, 1, 1), 10.0)
            table = 16 * torch.rand((2 * window - 1) ** 2, self.heads)
            images, self.grad = (torch.randn(batch, side, side, dim).to(dtype) for _ in range(2))
        self.leaves = [x.requires_grad_() for x in (images, to_qkv, back, scale, table)]

    def run(self, attention: Layer) -> list[Tensor]:
        """The output and the gradients of images, projections, scale and table."""
        return self._run(attention, self.leaves, self.grad)

    def one_image(self, attention: Layer, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The same of the first image alone, in float64, say."""
        images, *weights = self.leaves
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (images[:1], *weights)]
        return self._run(attention, leaves, self.grad[:1].to(dtype or self.grad.dtype))

    def _run(self, attention: Layer, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
        images, to_qkv, back, scale, table = leaves
        out = F.linear(attention(F.linear(images, to_qkv), scale, table, self.grid, self.heads), back)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def milliseconds(self, attention: Layer) -> float:
        if not self.grad.is_cuda:
            begin = time.perf_counter()
            self.run(attention)
            return 1000 * (time.perf_counter() - begin)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.run(attention)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_mib(self, attention: Layer) -> float:
        """NaN on a CPU."""
        if not self.grad.is_cuda:
            return float("nan")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.run(attention)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def error_of(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error (root mean squares) of output and gradients."""
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


class Row:
    """What is known of one variant in one window."""

    def __init__(self, name: str, case: Case, expected: list[Tensor], bound: float) -> None:
        self.name, self.case, self.attention = name, case, VARIANTS[name]
        self.error = self.peak = float("nan")
        self.times: list[float] = []
        self.failed = ""
        self.attempt(self._first, expected, bound)

    def attempt(self, part: Callable[..., None], *arguments: object) -> None:
        if not self.failed:
            try:
                part(*arguments)
            except torch.OutOfMemoryError:
                self.failed = "out of memory"
                torch.cuda.empty_cache()
            except Exception as error:  # noqa: BLE001  whatever a compiler, driver or another's operation raises
                self.failed = f"{type(error).__name__}: {error}".splitlines()[0].replace("|", "/")[:160]

    def _first(self, expected: list[Tensor], bound: float) -> None:
        self.error = error_of(self.case.one_image(self.attention), expected)
        if not self.error <= bound:
            self.failed = f"above the bound of {bound:g}: not timed"
            return
        self.peak = self.case.peak_mib(self.attention)

    def turn(self) -> None:
        self.times.append(self.case.milliseconds(self.attention))

    @property
    def median(self) -> float:
        return statistics.median(self.times) if self.times and not self.failed else float("nan")


def rows_of(window: int, options: argparse.Namespace) -> list[Row]:
    case = Case(window, options.tokens, options.dim, getattr(torch, options.dtype), options.device)
    probe = F.linear(case.leaves[0][:1], case.leaves[1])
    assert fused_available(probe, case.grid, case.heads), "the kernels do not serve this device or these sizes"
    if options.profile:
        case.run(fused_window_attention)  # compiles
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        case.run(fused_window_attention)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return []
    expected = case.one_image(eager, torch.float64)
    rows = [Row(name, case, expected, BOUNDS[options.dtype][name]) for name in options.variants]
    for _ in range(options.rounds):
        for row in rows:
            row.attempt(row.turn)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 12, 16, 24, 32])
    parser.add_argument("--tokens", type=int, default=147456, help="per pass, about (144 windows of 32 x 32)")
    parser.add_argument("--dim", type=int, default=512, help=f"channels; a head has {HEAD_DIM}")
    parser.add_argument("--dtype", choices=list(BOUNDS), default="bfloat16")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not (torch.cuda.is_available() and HAS_TRITON):
        print("attention_layer needs a CUDA device and the package triton; neither can be simulated", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(
        f"{card}, torch {torch.__version__}, {options.dtype}, {options.dim} channels, "
        f"about {options.tokens} tokens, shifted\n\n"
        "| window | variant | ms | times eager's speed | peak MiB | error to float64 | |\n|---|---|---|---|---|---|---|"
    )
    good = True
    for window in options.windows:
        rows = rows_of(window, options)
        base = next((row.median for row in rows if row.name == "eager"), float("nan"))
        for row in rows:
            print(
                f"| {window} | {row.name} | {row.median:.2f} | {base / row.median:.2f} | {row.peak:.0f} | "
                f"{row.error:.1e} | {row.failed} |",
                flush=True,
            )
        good &= not any(row.failed for row in rows if row.name == "fused")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
