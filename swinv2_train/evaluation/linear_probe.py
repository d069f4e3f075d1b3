"""Multinomial logistic regression on fixed features, by full-batch L-BFGS over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from swinv2_train.distributed import World, all_reduce_sum
from swinv2_train.evaluation.features import Labelled, hits, percent

ELEMENTS = 2**24
"""Elements of a block of features or of logits; bounds its memory (64 MiB in float32)."""

STRENGTHS = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Factors of half the squared weights, from strong to weak: each fit starts from the one before."""
ITERATIONS = 100
"""Iterations of L-BFGS for a strength; the last fit has three times as many."""


def linear(
    training: Labelled, testing: Labelled, num_classes: int, world: World, on_progress: Callable[[], None]
) -> list[float]:
    """Top-1 and top-5 in percent of multinomial logistic regression on the features, which are standardised in place.

    The L2 strength is the one whose fit to nine tenths of the training images has the best top-1 on the last tenth
    (of equals the strongest); then all are fitted.
    """
    standardise_([training, testing])
    held_out = in_tenth(training.positions)
    theta = torch.zeros(training.features.shape[1] + 1, num_classes, dtype=torch.float64)
    best: tuple[float, float, Tensor] | None = None
    for strength in STRENGTHS:
        theta = fit_logistic(theta, training, (~held_out).float(), strength, ITERATIONS, world, on_progress)
        score = float(all_reduce_sum(classified(theta, training, held_out.float(), world.device))[0])
        if best is None or score > best[0]:
            best = (score, strength, theta)
    assert best is not None
    _, strength, theta = best
    theta = fit_logistic(theta, training, torch.ones(len(training)), strength, 3 * ITERATIONS, world, on_progress)
    return percent(classified(theta, testing, torch.ones(len(testing)), world.device), testing)


def in_tenth(positions: Tensor) -> Tensor:
    """Whether each sample is in a fixed tenth, (n,) bool: a hash (splitmix64) of its position, the same on any rank."""
    z = positions.numpy().astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((z ^ (z >> np.uint64(31))) % np.uint64(10) == 0)


def standardise_(shares: Iterable[Labelled]) -> None:
    """Give every feature the mean 0 and the variance 1 over the first share's images of all ranks, in place."""
    shares = list(shares)
    features = shares[0].features
    size = max(1, ELEMENTS // features.shape[1])
    count = all_reduce_sum(torch.tensor(len(features)))
    mean, variance = torch.zeros(2, features.shape[1], dtype=torch.float64)
    parts = [slice(start, start + size) for start in range(0, len(features), size)]
    for part in parts:
        mean += features[part].sum(dim=0, dtype=torch.float64)
    mean = all_reduce_sum(mean) / count
    for part in parts:
        variance += (features[part] - mean).square().sum(dim=0)
    scale = (all_reduce_sum(variance) / count).sqrt().clamp(min=1e-6)  # a constant feature stays one
    for share in shares:
        share.features.sub_(mean.float()).div_(scale.float())


def fit_logistic(
    start: Tensor,
    samples: Labelled,
    counts: Tensor,
    strength: float,
    iterations: int,
    world: World,
    on_progress: Callable[[], None],
) -> Tensor:
    """Weights and, in the last row, biases of the least loss, (C + 1, classes) float64, by full-batch L-BFGS.

    counts: (n,) what each sample counts.  Rank 0 makes the steps, and every rank its part of each loss and gradient:
    hosts whose processors round differently would part ways otherwise, and wait for each other for ever.
    """
    total = float(all_reduce_sum(counts.sum()))

    def ask(theta: Tensor | None, last: bool = False) -> tuple[Tensor, bool]:
        """Rank 0's theta on every rank, and whether it is the last one."""
        said = torch.zeros(start.numel() + 1, dtype=torch.float64)
        if theta is not None:
            said = torch.cat([theta.flatten(), torch.tensor([float(last)], dtype=torch.float64)])
        heard = all_reduce_sum(said)
        return heard[:-1].view_as(start), bool(heard[-1])

    def answer(theta: Tensor) -> tuple[Tensor, Tensor]:
        on_progress()
        return loss_and_gradient(theta, samples, counts, strength, total, world.device)

    if not world.is_main:
        while True:
            theta, last = ask(None)
            if last:
                return theta
            answer(theta)
    parameter = nn.Parameter(start.clone())

    def closure() -> float:
        theta, _ = ask(parameter.detach())
        loss, parameter.grad = answer(theta)
        return float(loss)

    optimizer = torch.optim.LBFGS(
        [parameter],
        max_iter=iterations,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return ask(parameter.detach(), last=True)[0]


def loss_and_gradient(
    theta: Tensor, samples: Labelled, counts: Tensor, strength: float, total: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over all ranks' samples plus strength / 2 x the squared weights, and its gradient; float64.

    Products of features are float32, and sums over blocks and ranks float64.
    """
    sums = torch.zeros(theta.numel() + 1, dtype=torch.float64, device=device)
    gradient = sums[:-1].view_as(theta)
    for logits, block, labels, count in _blocks(theta, samples, counts, device):
        log_p = logits.log_softmax(dim=1)
        sums[-1] -= (log_p.gather(1, labels.unsqueeze(1)).squeeze(1) * count).sum(dtype=torch.float64)
        slope = log_p.exp()
        slope[torch.arange(len(labels), device=device), labels] -= 1
        slope *= count.unsqueeze(1)
        gradient[:-1] += block.T @ slope
        gradient[-1] += slope.sum(dim=0)
    sums = all_reduce_sum(sums).cpu() / total
    weights = theta[:-1]
    sums[-1] += strength / 2 * weights.square().sum()
    gradient = sums[:-1].view_as(theta)
    gradient[:-1] += strength * weights
    return sums[-1], gradient


def classified(theta: Tensor, samples: Labelled, counts: Tensor, device: torch.device) -> Tensor:
    """hits() among this rank's samples that count."""
    right = torch.zeros(2, dtype=torch.float64)
    for logits, _, labels, count in _blocks(theta, samples, counts, device):
        chosen = count > 0
        right += hits(logits[chosen], labels[chosen])
    return right


def _blocks(
    theta: Tensor, samples: Labelled, counts: Tensor, device: torch.device
) -> Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Logits (b, classes), features (b, C), labels (b,) and counts (b,) of blocks of samples, on the device."""
    weights, bias = theta[:-1].to(device, torch.float32), theta[-1].to(device, torch.float32)
    size = max(1, ELEMENTS // max(samples.features.shape[1], theta.shape[1]))
    for start in range(0, len(samples), size):
        part = slice(start, start + size)
        block = samples.features[part].to(device)
        yield torch.addmm(bias, block, weights), block, samples.labels[part].to(device), counts[part].to(device)
