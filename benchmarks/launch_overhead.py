"""What the host pays to launch the fused attention: as torch.library's operation, and as a plain autograd.Function.

    python -m benchmarks.launch_overhead [--calls 200]

A map of one window of one token has next to nothing to compute, so the difference is what is paid for every layer of
every step, on a GPU too, where the host must stay ahead of the card.  On CUDA where there is a card, and then the time
of the launches alone counts: nobody waits for the kernels.  One thread, the two in turns, medians of CPU microseconds.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from swinv2_train.models.kernels import dispatch
from swinv2_train.models.windows import WindowGrid

ROUNDS = 15
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GRID = WindowGrid((1, 1), (1, 1), (0, 0))
Call = Callable[[], object]


def microseconds(call: Call, calls: int) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()  # an empty queue, which takes more launches than these without blocking the host
    start = time.thread_time() if DEVICE.type == "cuda" else time.process_time()
    for _ in range(calls):
        call()
    end = time.thread_time() if DEVICE.type == "cuda" else time.process_time()
    return 1e6 * (end - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200, help="between two looks at the clock")
    options = parser.parse_args()
    torch.set_num_threads(1)
    leaves = [x.to(DEVICE) for x in (torch.randn(1, 1, 1, 48), torch.ones(1, 1, 1), torch.zeros(1, 1))]
    for leaf in leaves:
        leaf.requires_grad_()
    grad = torch.ones(1, 1, 1, 16, device=DEVICE)
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
        found = [[microseconds(way, options.calls) for way in ways] for _ in range(ROUNDS + 1)][1:]
        alone, slow, fast = (statistics.median(column) for column in zip(*found, strict=True))
        ratio = (slow - alone) / (fast - alone)
        print(f"| {name} | {alone:.0f} | {slow:.0f} | {fast:.0f} | {slow / fast:.1f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
