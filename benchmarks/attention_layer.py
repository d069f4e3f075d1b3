"""One window attention layer, forward and backward: the fused kernels beside the eager path and stock attention.

    python benchmarks/attention_layer.py [--windows 8 12 16 24 32] [--tokens 147456] [--dim 512] [--dtype bfloat16]

Needs CUDA and Triton.  A layer is the projection to q, k, v, shifted windowed cosine attention and the projection back;
all variants share weights and inputs.  "eager" restates the official arithmetic (roll, cut, normalise, N x N scores,
bias and mask, softmax, and all the way back); "stock" hands the normalised windows and one additive tensor to
scaled_dot_product_attention.  Outputs and all gradients are compared before anything is timed; the variants take
turns, and what counts is the median.  Peak memory is what one forward and backward pass allocates above weights and
inputs.  Prints a Markdown table; exit code 1 where a comparison fails, 2 without CUDA.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.models.kernels.dispatch import HAS_TRITON, fused_available, fused_window_attention
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
    return F.normalize(q.float(), dim=-1).to(q.dtype), F.normalize(k.float(), dim=-1).to(k.dtype), v


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


VARIANTS: dict[str, Layer] = {"eager": eager, "stock": stock, "fused": fused_window_attention}


class Case:
    """Weights and inputs of one layer, and a forward and backward pass through it."""

    def __init__(self, window: int, tokens: int, dim: int, dtype: torch.dtype) -> None:
        per_window = window * window
        side = 4 * window  # 16 windows per image
        batch = max(1, tokens // (16 * per_window))
        self.grid = WindowGrid((side, side), (window, window), (window // 2, window // 2))
        self.heads = dim // HEAD_DIM
        self.images = torch.randn(batch, side, side, dim, device="cuda", dtype=dtype, requires_grad=True)
        self.grad = torch.randn_like(self.images)
        to_qkv = (torch.randn(3 * dim, dim, device="cuda") / dim**0.5).to(dtype)
        back = (torch.randn(dim, dim, device="cuda") / dim**0.5).to(dtype)
        scale = torch.full((self.heads, 1, 1), 10.0, device="cuda")
        table = 16 * torch.rand((2 * window - 1) ** 2, self.heads, device="cuda")
        self.weights = [x.requires_grad_() for x in (to_qkv, back, scale, table)]

    def run(self, attention: Layer) -> list[Tensor]:
        """The output and the gradients of images, projections, scale and table."""
        to_qkv, back, scale, table = self.weights
        out = F.linear(attention(F.linear(self.images, to_qkv), scale, table, self.grid, self.heads), back)
        return [out.detach(), *torch.autograd.grad(out, [self.images, *self.weights], self.grad)]

    def milliseconds(self, attention: Layer) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.run(attention)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_mib(self, attention: Layer) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.run(attention)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error (root mean squares) of output and gradients."""
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(found, expected, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 12, 16, 24, 32])
    parser.add_argument("--tokens", type=int, default=147456, help="per pass, about (144 windows of 32 x 32)")
    parser.add_argument("--dim", type=int, default=512, help=f"channels; a head has {HEAD_DIM}")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=3e-2)
    options = parser.parse_args()
    if not torch.cuda.is_available() or not HAS_TRITON:
        print("attention_layer needs a CUDA device and the package triton; neither can be simulated", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {importlib.metadata.version('triton')}, "
        f"{options.dtype}, {options.dim} channels, about {options.tokens} tokens, shifted\n"
    )
    print(
        "| window | variant | ms | times eager's speed | peak MiB | difference from eager |\n|---|---|---|---|---|---|"
    )
    agree = True
    for window in options.windows:
        case = Case(window, options.tokens, options.dim, getattr(torch, options.dtype))
        probe = F.linear(case.images[:1], case.weights[0])
        assert fused_available(probe, case.grid, case.heads), "the kernels do not serve this card or these sizes"
        expected = case.run(eager)
        errors, peaks = {}, {}
        for name, attention in VARIANTS.items():
            errors[name] = difference(case.run(attention), expected)
            peaks[name] = case.peak_mib(attention)
        agree &= max(errors.values()) < options.tolerance
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for _ in range(options.rounds):
            for name, attention in VARIANTS.items():
                times[name].append(case.milliseconds(attention))
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, median in medians.items():
            print(
                f"| {window} | {name} | {median:.2f} | {medians['eager'] / median:.2f} | {peaks[name]:.0f} | "
                f"{errors[name]:.1e} |",
                flush=True,
            )
    if not agree:
        print(f"outputs or gradients differ by more than {options.tolerance}: do not trust the times", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
