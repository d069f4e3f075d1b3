"""Clips to look at: frames in a row, and below what is right the classes that were said to be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from swinv2_train.report.pictures import captioned

PICTURE_CLIPS = 4
PICTURE_FRAMES = 8
"""Of a longer clip so many, evenly from the first to the last."""
SAID = 3
"""Classes that are named of a clip, the best first."""


def frames_in_a_row(clip: Tensor) -> list[np.ndarray]:
    """uint8 (3, T, H, W) to at most PICTURE_FRAMES frames, uint8 (H, W, 3)."""
    count = clip.shape[1]
    places = torch.linspace(0, count - 1, min(count, PICTURE_FRAMES)).round().long()
    return [clip[:, place].permute(1, 2, 0).cpu().numpy() for place in places]


def clip_picture(
    clips: Tensor, right: Sequence[Sequence[int]], probabilities: Tensor, names: Sequence[str] | None
) -> np.ndarray:
    """Frames of each clip in a row, over them its right classes and the most probable ones.

    clips: uint8 (B, 3, T, H, W).  right: each clip's classes; empty where they are not known.  probabilities: (B,
    classes).  names: of the classes; None = their numbers.  Returns uint8 (H', W', 3).
    """
    rows = []
    best = probabilities.topk(min(SAID, probabilities.shape[1]), dim=1)
    for clip, labels, classes, shares in zip(clips, right, best.indices.tolist(), best.values.tolist(), strict=True):
        said = ", ".join(f"{_name(each, names)} {share:.2f}" for each, share in zip(classes, shares, strict=True))
        text = f"predicted: {said}"
        if labels:
            verdict = "right" if classes[0] in labels else "WRONG"
            text = f"{verdict}; it is {', '.join(_name(each, names) for each in labels)}; {text}"
        rows.append((text, frames_in_a_row(clip)))
    return captioned(rows)


def _name(number: int, names: Sequence[str] | None) -> str:
    name = str(number) if names is None or number >= len(names) else names[number]
    return name.encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font has
