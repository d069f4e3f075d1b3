"""Does a file say what the model says?  Random inputs of several batch sizes, and sizes, through both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swinv2_train.config import MachineError
from swinv2_train.serving.any_size import size_step
from swinv2_train.serving.graphs import Run
from swinv2_train.serving.served import Served

BATCHES = (1, 3, 5)
TOLERANCE = 1e-4
"""Absolute, and of the value itself."""


class Case(NamedTuple):
    """An input, and what the model makes of it."""

    images: Tensor
    expected: Tensor


def traced_sides(served: Served, any_size: bool) -> tuple[int, ...]:
    """The sides of the example that is traced: as :func:`swinv2_train.serving.graphs.traced` wants them."""
    sides = served.encoder.input_size
    if not any_size:
        return sides
    step = size_step(served.encoder)
    height = max(3, sides[0] // step)
    return height * step, (height + 1) * step


def cases(served: Served, any_size: bool) -> list[Case]:
    """Batches of the model's size; where it may be any, of the smallest, and of higher and wider ones than its own."""
    sides = [served.encoder.input_size] * len(BATCHES)
    if any_size:
        step = size_step(served.encoder)
        height, width = traced_sides(served, any_size)
        sides = [(2 * step, 2 * step), (height, width + step), (height + 2 * step, height)]
    found = []
    with torch.no_grad():
        for seed, (batch, each) in enumerate(zip(BATCHES, sides, strict=True)):
            images = served.input_like(batch, each, seed)
            found.append(Case(images, served(images)))
    return found


def largest_difference(run: Run, cases: list[Case], name: str) -> float:
    """Over all cases.  Raises MachineError where one is not within TOLERANCE, or not of the model's shape."""
    largest = 0.0
    for images, expected in cases:
        found = run(images).detach()
        shape = tuple(images.shape)
        if found.shape != expected.shape:
            raise MachineError(
                f"{name} gives {tuple(found.shape)} for images {shape}, the model {tuple(expected.shape)}; "
                "nothing is written"
            )
        difference = (found - expected).abs()
        if not bool((difference <= TOLERANCE * (1 + expected.abs())).all()):  # NaN is not
            raise MachineError(
                f"{name} differs from the model by {float(difference.max()):.3g} for images {shape}, more than "
                f"{TOLERANCE:g} and {TOLERANCE:g} of the value; nothing is written: an exporter or a runtime computes "
                "something else, so try another opset or version of torch and onnxruntime"
            )
        largest = max(largest, float(difference.max()))
    return largest
