"""Sizes of inputs, windows and maps as the model takes them: checked, and completed by the axis of time for clips."""

from __future__ import annotations

from collections.abc import Sequence

from swinv2_train.models.windows import Axes

Size = int | Sequence[int]
NAMES = ("frames", "height", "width")


def as_pair(value: Size, name: str) -> tuple[int, int]:
    """An int or a (height, width) pair as a pair of positive ints; ValueError otherwise."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in pair):
        raise ValueError(f"{name} ({value!r}) must be a positive int or a (height, width) pair of them")
    return pair[0], pair[1]


def check_patches(size: Axes, patch: Axes, name: str) -> None:
    """ValueError unless every axis, in frames and pixels, is whole patches."""
    for axis, length, unit in zip(NAMES[-len(size) :], size, patch, strict=True):
        if length % unit or length == 0:
            below = length // unit * unit
            nearest = ", ".join(str(n) for n in (below, below + unit) if n)
            key = "patch_frames" if axis == "frames" else "patch_size"
            raise ValueError(f"{name} {axis} {length} is not a multiple of {key} {unit}; nearest: {nearest}")


def trained_window(given: Size, used: Axes, frames: int) -> Axes:
    """The window at which a stage's position bias was trained: an entry of pretrained_window_sizes as a pair, of clips
    with pretrained_window_frames before it, and the window used where one is 0; ValueError for anything else."""
    pair = (given, given) if isinstance(given, int) else tuple(given)
    if len(pair) == 2:
        pair = (pair[0] or used[-2], pair[1] or used[-1])
    return (*(frames or length for length in used[:-2]), *as_pair(pair, "pretrained_window_sizes"))


def map_sizes(size: Axes, patch: Axes, stages: int) -> list[Axes]:
    """The map of every stage for an input of whole patches: merging halves the sides, and leaves time alone."""
    sizes = [tuple(length // unit for length, unit in zip(size, patch, strict=True))]
    while len(sizes) < stages:
        *time, height, width = sizes[-1]
        sizes.append((*time, (height + 1) // 2, (width + 1) // 2))
    return sizes
