"""The window attention kernel for CPUs beside the reference, without projections: forward and backward, by CPU time.

    python benchmarks/attention_layer_cpu.py

One thread, the two in turns, medians of CPU seconds (a shared machine's clock says little).  Prints a Markdown table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from swinv2_train.models.cosine import window_attention
from swinv2_train.models.kernels.dispatch import fused_window_attention
from swinv2_train.models.windows import window_grid

CASES = [  # batch, side of the map, window, heads, shifted: stages of SwinV2-T at 256/8 and SwinV2-B at 192/12
    (8, 64, 8, 3, False), (8, 64, 8, 3, True), (8, 32, 8, 6, True), (8, 16, 8, 12, True), (8, 8, 8, 24, False),
    (4, 48, 12, 4, True), (4, 24, 12, 8, True), (4, 12, 12, 16, False), (4, 6, 6, 32, False),
]  # fmt: skip
ROUNDS = 7


def milliseconds(attention: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor, *rest: object) -> float:
    start = time.process_time()
    torch.autograd.grad(attention(*leaves, *rest), leaves, grad)
    return 1000 * (time.process_time() - start)


def main() -> None:
    torch.set_num_threads(1)
    print(
        "| map | window | heads | shifted | type | reference, ms | kernel, ms | x |\n|---|---|---|---|---|---|---|---|"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for batch, side, window, heads, shifted in CASES:
            torch.manual_seed(0)
            grid = window_grid((side, side), (window, window), shifted)
            qkv = torch.randn(batch, side, side, 3 * 32 * heads).to(dtype)
            scale, table = 1 + 20 * torch.rand(heads, 1, 1), 16 * torch.rand((2 * window - 1) ** 2, heads)
            leaves = [x.requires_grad_() for x in (qkv, scale, table)]
            grad = torch.randn(batch, side, side, 32 * heads).to(dtype)
            pair = (window_attention, fused_window_attention)
            found = [[milliseconds(each, leaves, grad, grid, heads) for each in pair] for _ in range(ROUNDS)][1:]
            reference, kernel = (statistics.median(column) for column in zip(*found, strict=True))
            print(
                f"| {batch} x {side} x {side} | {window} | {heads} | {'yes' if shifted else 'no'} | {str(dtype)[6:]} "
                f"| {reference:.1f} | {kernel:.1f} | {reference / kernel:.1f} |"
            )


if __name__ == "__main__":
    main()
