"""The target of SimMIM's pre-training, every pixel by the window around it: separable sums beside square pooling.

    OMP_NUM_THREADS=1 python -m benchmarks.norm_target

Forward alone (no gradient flows to a target), in turns, medians of seven; CUDA events where there is a card, else CPU
time.  Prints a Markdown table with the largest difference from float64 of either.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.models.simmim import norm_target

WINDOW, ROUNDS = 47, 7
SIDES = {"cuda": [(128, 192), (8, 1536)], "cpu": [(8, 192), (1, 512)]}


def square_pooling(images: Tensor, window_px: int) -> Tensor:
    """As the official code and this project had it: three pools over window_px x window_px pixels."""
    pad = window_px // 2
    mean = F.avg_pool2d(images, window_px, stride=1, padding=pad, count_include_pad=False)
    square = F.avg_pool2d(images**2, window_px, stride=1, padding=pad, count_include_pad=False)
    count = F.avg_pool2d(torch.ones_like(images), window_px, stride=1, padding=pad, divisor_override=1)
    return (images - mean) / (((square - mean**2) * (count / (count - 1))).clamp(min=0) + 1e-6) ** 0.5


def milliseconds(function: Callable[[Tensor, int], Tensor], images: Tensor) -> float:
    if images.device.type == "cpu":
        start = time.process_time()
        function(images, WINDOW)
        return 1e3 * (time.process_time() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function(images, WINDOW)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| images | square pooling, ms | separable, ms | x | from float64, square | separable |")
    print("|---" * 6 + "|")
    for batch, side in SIDES[device]:
        torch.manual_seed(0)
        images = torch.randn(batch, 3, side, side, device=device)
        ways = (square_pooling, norm_target)
        exact = norm_target(images[:1].double(), WINDOW)
        errors = [(way(images[:1], WINDOW) - exact).abs().max().item() for way in ways]
        found = [[milliseconds(way, images) for way in ways] for _ in range(ROUNDS)][1:]
        slow, fast = (statistics.median(column) for column in zip(*found, strict=True))
        print(
            f"| {batch} x 3 x {side} x {side} | {slow:.1f} | {fast:.1f} | {slow / fast:.1f} "
            f"| {errors[0]:.1e} | {errors[1]:.1e} |"
        )


if __name__ == "__main__":
    main()
