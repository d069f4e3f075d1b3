"""The passes between a block's products on a CPU, beside torch's operations; and a model beside its products alone.

    python -m benchmarks.cpu_passes [--threads 2] [--rounds 16] [--parts]

In float32, all in turns in one process, in alternating order; CPU seconds of all threads (a shared machine's clock says
little).  Shares are of the same turn, with their quartiles.  "torch's operations": the same model with the attention
kernel and without the passes.  --parts: each pass at the sizes of SwinV2-T's stages too, on one thread.  Prints
Markdown tables.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from operator import truediv
from statistics import median, quantiles
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.contestants import Case
from scripts.matrix_products import MatrixProducts
from swinv2_train.models.fused_layers import ResidualLayerNorm
from swinv2_train.models.kernels import cpu_passes
from swinv2_train.models.swin_v2 import Mlp
from swinv2_train.runtime import tune_allocator

CASES = (Case("tiny", 256, 8, 8), Case("base", 192, 12, 4))
STAGES = ((32768, 96), (8192, 192), (2048, 384), (512, 768))
"""Tokens of 8 images and channels."""


def without_passes() -> AbstractContextManager[object]:
    return patch.object(cpu_passes, "serves", lambda *_: False)


def timed(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each, in turns after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in list(works.items())[:: -1 if turn % 2 else 1]:
            start = time.process_time()
            work()
            if turn:
                found[name].append(time.process_time() - start)
    return found


def whole(case: Case, rounds: int) -> None:
    torch.manual_seed(0)
    model = case.model(fused_attention=True).train()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # blocks start as the identity, whose branches have gradients of 0
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    images = torch.randn(case.batch_size, 3, case.img_size, case.img_size)
    products = MatrixProducts(model, case.batch_size, torch.float32, torch.device("cpu"))

    def step() -> None:
        model.zero_grad()
        model(images).square().mean().backward()

    def plain() -> None:
        with without_passes():
            step()

    def limit() -> None:
        products.forward()
        products.backward()

    def torchs_gelu() -> None:
        with patch.object(cpu_passes, "gelu", F.gelu):
            step()

    works = {"matrix products alone": limit, "torch's operations": plain, "passes": step}
    found = timed(works | {"passes, but torch's GELU": torchs_gelu}, rounds)
    for name, seconds in found.items():
        low, middle, high = quantiles(map(truediv, found["matrix products alone"], seconds))
        _, beside, _ = quantiles(map(truediv, found["torch's operations"], seconds))
        print(
            f"| {case.name}, {case.batch_size} images | {name} | {median(seconds):.3f} | {middle:.3f} "
            f"({low:.3f} to {high:.3f}) | {beside:.3f} |",
            flush=True,
        )


def parts(rounds: int) -> None:
    """Forward and backward pass of what stands between attention and the block's end, at every stage's size."""
    torch.set_num_threads(1)
    print("\n| tokens x channels | what | torch's operations, ms | in passes, ms | x |\n|---|---|---|---|---|")
    for tokens, channels in STAGES:
        norm, mlp = ResidualLayerNorm(channels), Mlp(channels, 4 * channels)
        x, residual, grad = (torch.randn(8, tokens // 8, channels, requires_grad=g) for g in (True, True, False))
        wide = torch.randn(8, tokens // 8, 4 * channels)
        factors = torch.full((8, 1, 1), 1.25)

        def normed(fused: bool) -> Tensor:
            return norm(x, residual, factors, fused)  # noqa: B023  called at once

        def hidden(fused: bool) -> Tensor:
            return (cpu_passes.gelu if fused else F.gelu)(mlp.fc1(x))  # noqa: B023

        for what, layer, grad_of in (("norm, factor, residual", normed, grad), ("fc1 and GELU", hidden, wide)):

            def work(fused: bool) -> None:
                layer(fused).backward(grad_of)  # noqa: B023

            found = timed({"torch": lambda: work(False), "passes": lambda: work(True)}, rounds)  # noqa: B023
            before, now = (1000 * median(seconds) for seconds in found.values())
            print(f"| {tokens} x {channels} | {what} | {before:.1f} | {now:.1f} | {before / now:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--parts", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tune_allocator()
    print("| case | forward and backward | CPU s | speed beside the products alone | beside torch's operations |")
    print("|---|---|---|---|---|")
    for case in CASES:
        whole(case, options.rounds)
    if options.parts:
        parts(options.rounds)


if __name__ == "__main__":
    main()
