"""Linear layers in float32 by torch (MKL) and by oneDNN, at the sizes of SwinV2-T's stages and SwinV2-B's.

    python -m benchmarks.cpu_products [--threads 2] [--rounds 9]
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m benchmarks.cpu_products   # as without AVX-512

Forward and backward pass with the bias, in turns in one process, the fastest of the rounds; a row's GFLOP/s are of its
three products.  Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from swinv2_train.models.kernels.cpu_products import linear
from swinv2_train.runtime import tune_allocator

LAYERS = {
    "SwinV2-T, 256 px, 8 images": (
        (32768, 96, 288), (32768, 96, 384), (32768, 384, 96), (8192, 192, 768), (2048, 384, 1536), (512, 768, 3072),
        (512, 3072, 768),
    ),
    "SwinV2-B, 192 px, 4 images": ((9216, 128, 512), (2304, 256, 1024), (576, 512, 2048), (144, 1024, 4096)),
}  # fmt: skip
"""Rows, channels in, channels out."""


def seconds(layer: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.grad(layer(*tensors), tensors, grad)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tune_allocator()
    print("| layers of | rows x in x out | torch's, GFLOP/s | ours, GFLOP/s | x |\n|---|---|---|---|---|")
    for model, layers in LAYERS.items():
        for rows, inputs, outputs in layers:
            shapes, grad = ((rows, inputs), (outputs, inputs), (outputs,)), torch.randn(rows, outputs)
            tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
            turns = [[seconds(layer, tensors, grad) for layer in (F.linear, linear)] for _ in range(options.rounds + 1)]
            before, now = (6e-9 * rows * inputs * outputs / min(of) for of in zip(*turns[1:], strict=True))
            print(f"| {model} | {rows} x {inputs} x {outputs} | {before:.0f} | {now:.0f} | {now / before:.2f} |")


if __name__ == "__main__":
    main()
