"""What the host pays to launch the fused attention: as torch.library's operation, and as a plain autograd.Function.

    python -m benchmarks.launch_overhead

A map of one window of one token has next to nothing to compute, so the difference is what is paid for every layer of
every step, on a GPU too, where the host must stay ahead of the card.  One thread, the two in turns, medians of CPU
microseconds.  Prints a Markdown table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from swinv2_train.models.kernels import dispatch
from swinv2_train.models.windows import WindowGrid

CALLS, ROUNDS = 200, 15
GRID = WindowGrid((1, 1), (1, 1), (0, 0))
Call = Callable[[], object]


def microseconds(call: Call) -> float:
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return 1e6 * (time.process_time() - start) / CALLS


def main() -> None:
    torch.set_num_threads(1)
    leaves = [torch.randn(1, 1, 1, 48), torch.ones(1, 1, 1), torch.zeros(1, 1)]
    for leaf in leaves:
        leaf.requires_grad_()
    grad = torch.ones(1, 1, 1, 16)
    sizes = (*GRID, 1)
    detached = [leaf.detach() for leaf in leaves]
    kept = dispatch._attend(*detached, *sizes)

    def as_operation() -> Tensor:
        out: Tensor = dispatch._forward(*leaves, *sizes)[0]
        return out

    def as_function() -> Tensor:
        return dispatch.fused_window_attention(*leaves, GRID, 1)

    def kernel() -> object:
        return dispatch._attend(*detached, *sizes)

    def kernels() -> object:
        return kernel(), dispatch._attend_backward(grad, *detached, *kept, *sizes)

    def evaluated(way: Call) -> Call:
        return torch.no_grad()(way)

    def trained(way: Callable[[], Tensor]) -> Call:
        return lambda: torch.autograd.grad(way(), leaves, grad)

    rows: dict[str, tuple[Call, Call, Call]] = {
        "forward, no gradients": (kernel, evaluated(as_operation), evaluated(as_function)),
        "forward": (kernel, as_operation, as_function),
        "forward and backward": (kernels, trained(as_operation), trained(as_function)),
    }
    print("| CPU us | kernels alone | torch.library | plain Function | x | x of what is added |\n" + "|---" * 6 + "|")
    for name, ways in rows.items():
        found = [[microseconds(way) for way in ways] for _ in range(ROUNDS + 1)][1:]
        alone, slow, fast = (statistics.median(column) for column in zip(*found, strict=True))
        ratio = (slow - alone) / (fast - alone)
        print(f"| {name} | {alone:.0f} | {slow:.0f} | {fast:.0f} | {slow / fast:.1f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
