"""The patch embedding and SimMIM's decoder as convolutions and as products of matrices, forward and backward, in turn.

    python benchmarks/patch_conv.py [--rounds 15]

Prints a Markdown table: medians of the time on a GPU, or of CPU seconds of all threads, so that other load on the
machine hardly counts; the ratio is the product's to the convolution's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.models.patch_conv import PatchConv2d

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {  # images, channels, pixels (or tokens) per side, patch, out: of swinv2-tiny and of the demo
    "patch embedding, 192 px, tiny": (16, 3, 192, 4, 96),
    "patch embedding, 32 px, demo": (128, 3, 32, 2, 48),
    "decoder, 192 px, tiny": (16, 768, 6, 1, 3072),
    "decoder, 32 px, demo": (128, 192, 4, 1, 192),
}


def convolution(layer: PatchConv2d, x: Tensor) -> Tensor:
    """What PatchConv2d replaces."""
    return F.conv2d(x, layer.weight, layer.bias, stride=layer.stride)


def seconds(work: Callable[[], object]) -> float:
    """Of one call: on a GPU until it is done, on a CPU those of all threads."""
    if DEVICE.type == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| layer | dtype | convolution, ms | product, ms | ratio | largest difference |\n|---|---|---|---|---|---|")
    for name, (batch, channels, side, patch, out) in CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            layer = PatchConv2d(channels, out, patch).to(DEVICE, dtype)
            x = torch.randn(batch, channels, side, side, device=DEVICE, dtype=dtype)
            if patch == 1:  # a map of tokens: channels last, and its gradient is wanted
                x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
            wanted = [each for each in (x, *layer.parameters()) if each.requires_grad]
            grad = torch.randn_like(convolution(layer, x))

            def run(forward: Callable[[PatchConv2d, Tensor], Tensor]) -> list[Tensor]:
                result = forward(layer, x)  # noqa: B023  called before the next case
                return [result.detach(), *torch.autograd.grad(result, wanted, grad)]  # noqa: B023

            forms = (convolution, PatchConv2d.forward)
            results = [run(form) for form in forms]
            difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True))
            times: list[list[float]] = [[], []]
            for _ in range(options.rounds):
                for kept, form in zip(times, forms, strict=True):
                    kept.append(seconds(lambda form=form: run(form)))  # type: ignore[misc]
            old, new = (1000 * statistics.median(each) for each in times)
            kind = str(dtype).removeprefix("torch.")
            print(f"| {name} | {kind} | {old:.2f} | {new:.2f} | {new / old:.2f} | {difference:.1e} |")


if __name__ == "__main__":
    main()
