"""What a CPU's passes and products gain in a model, beside its matrix products alone; and each pass for itself.

    python -m benchmarks.cpu_passes [--threads 2] [--rounds 16] [--parts]

In fp32, and in bf16 where the processor has units; all in turns in one process, in alternating order; CPU seconds
of all threads (a shared machine's clock says little).  Shares are of the same turn, with their quartiles.  "torch's":
MKL where models/kernels/cpu_products.py has oneDNN, and torch's operations in the place of the passes, both with the
attention kernel.  --parts: each pass at the sizes of SwinV2-T's stages too, on one thread.  Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import functools
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
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.fused_layers import ResidualLayerNorm
from swinv2_train.models.kernels import cpu_passes, cpu_products
from swinv2_train.models.swin_v2 import Mlp
from swinv2_train.runtime import tune_allocator
from swinv2_train.runtime.cpu_speed import cpu_speed, slow_bf16

CASES = (Case("tiny", 256, 8, 8), Case("base", 192, 12, 4))
LIMIT = "the products alone"
STAGES = ((32768, 96), (8192, 192), (2048, 384), (512, 768))
"""Tokens of 8 images and channels."""
TABLES = (((8, 8), 3), ((12, 12), 4), ((12, 12), 32), ((8, 8, 8), 4))
"""Windows, of images and of a clip, and heads."""


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


def with_mkl() -> AbstractContextManager[object]:
    return patch.object(cpu_products, "mkl_is_slow", lambda: False)


def whole(case: Case, dtype: torch.dtype, rounds: int) -> None:
    torch.manual_seed(0)
    model = case.model(fused_attention=True).train()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # blocks start as the identity, whose branches have gradients of 0
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype)
    images = torch.randn(case.batch_size, 3, case.img_size, case.img_size, dtype=dtype)
    products = MatrixProducts(model, case.batch_size, dtype, torch.device("cpu"))

    def step() -> None:
        model.zero_grad()
        model(images).float().square().mean().backward()

    def operations() -> None:
        with without_passes():
            step()

    def before() -> None:
        with with_mkl():
            operations()

    def limit() -> None:
        products.forward()
        products.backward()

    def torchs_limit() -> None:
        with with_mkl():
            limit()

    works = {LIMIT: limit, "torch's products alone": torchs_limit, "torch's products and operations": before}
    works |= {"the products, torch's operations": operations, "the products and passes": step}
    if dtype == torch.bfloat16 or not cpu_products.mkl_is_slow():
        del works["torch's products alone"], works["torch's products and operations"]  # the same as the others
    found = timed(works, rounds)
    for name, seconds in found.items():
        low, middle, high = quantiles(map(truediv, found[LIMIT], seconds))
        kind = "bf16" if dtype == torch.bfloat16 else "fp32"
        print(
            f"| {case.name}, {case.batch_size} images, {kind} | {name} | {median(seconds):.3f} | {middle:.3f} "
            f"({low:.3f} to {high:.3f}) |",
            flush=True,
        )


def parts(rounds: int) -> None:
    """Forward and backward pass of the position table and of what stands between attention and the block's end."""
    torch.set_num_threads(1)
    print("\n| size | what | torch's operations, ms | in passes, ms | x |\n|---|---|---|---|---|")
    for tokens, channels in STAGES:
        norm, mlp = ResidualLayerNorm(channels), Mlp(channels, 4 * channels)
        x, residual, grad = (torch.randn(8, tokens // 8, channels, requires_grad=g) for g in (True, True, False))
        wide = torch.randn(8, tokens // 8, 4 * channels)
        factors = torch.full((8, 1, 1), 1.25)

        def normed(fused: bool) -> Tensor:
            return norm(x, residual, factors, fused)  # noqa: B023  called at once

        def hidden(fused: bool) -> Tensor:
            return cpu_passes.gelu(*mlp.fc1(x, apart=True)) if fused else F.gelu(mlp.fc1(x))  # noqa: B023

        for what, layer, grad_of in (("norm, factor, residual", normed, grad), ("fc1 and GELU", hidden, wide)):
            part(f"{tokens} tokens x {channels} channels", what, layer, grad_of, rounds)
    for window, heads in TABLES:
        attention = WindowAttention(heads, heads, window)
        table = functools.partial(attention.position_table, window, torch.device("cpu"))
        size = f"window {' x '.join(map(str, window))}, {heads} heads"
        part(size, "position table", table, torch.randn_like(table()), rounds)


def part(size: str, what: str, layer: Callable[[bool], Tensor], grad: Tensor, rounds: int) -> None:
    """layer(fused): its output."""

    def work(fused: bool) -> None:
        layer(fused).backward(grad)

    found = timed({"torch": lambda: work(False), "passes": lambda: work(True)}, rounds)
    before, now = (1000 * median(seconds) for seconds in found.values())
    print(f"| {size} | {what} | {before:.2f} | {now:.2f} | {before / now:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--parts", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tune_allocator()
    print("| case | forward and backward | CPU s | speed beside the products alone |\n|---|---|---|---|")
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16)[: 1 if slow_bf16(cpu_speed()) else 2]:
            whole(case, dtype, options.rounds)
    if options.parts:
        parts(options.rounds)


if __name__ == "__main__":
    main()
