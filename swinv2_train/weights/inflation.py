"""Weights of images in a model of clips, exactly: what it computes of a repeated frame is what the image model does.

The patch embedding is repeated along time and divided by the frames of a patch, and the position bias looks at time
with weights of 0, so that it is alike at every distance in time; both as arXiv:2106.13230 section 3.3 has it for Swin
V1, with its table repeated.  Every key of a window is then there once a frame, and the softmax divides by the frames.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from swinv2_train.storage.lazy_tensors import LazyTensor
from swinv2_train.weights.bands import PROJECTION

Shape = tuple[int, ...]
COLUMNS = ".cpb_mlp.0.weight"
"""Ends the names of the bias MLPs' first layers: (hidden, axes), the columns being height, width and time."""


def inflated(theirs: Mapping[str, LazyTensor], ours: Mapping[str, Shape]) -> dict[str, LazyTensor]:
    """Those of theirs, of images, that a model of clips has in another shape; empty where both are of one kind.

    theirs, ours: by official names without "encoder.".  A SimMIM decoder predicts every frame of a patch alike.
    """
    projection, wanted = theirs.get(PROJECTION), ours.get(PROJECTION, ())
    if projection is None or len(projection.shape) != 4 or len(wanted) != 5:
        return {}
    frames = wanted[2]
    found = {PROJECTION: _repeated_in_time(projection, frames)}
    for name, entry in theirs.items():
        if name.endswith(COLUMNS) and len(entry.shape) == 2:
            found[name] = _with_time(entry)
        elif name.startswith("decoder.") and frames > 1:
            found[name] = _repeated(entry, frames)
    return found


def inflation(names: Mapping[str, LazyTensor], frames: int) -> str:
    """What inflated() has done to these, in words."""
    biases = sum(name.endswith(COLUMNS) for name in names)
    return (
        f"weights of images became those of clips: the patch embedding divided over {frames} "
        f"frame{'s' * (frames > 1)}, and {biases} position biases alike at every distance in time, which so far has "
        "weights of 0; all else as it is"
    )


def _repeated_in_time(entry: LazyTensor, frames: int) -> LazyTensor:
    channels, bands, *sides = entry.shape

    def read() -> torch.Tensor:
        weight = entry.read()
        return (weight.double() / frames).to(weight.dtype).unsqueeze(2).repeat(1, 1, frames, 1, 1)

    return LazyTensor((channels, bands, frames, *sides), entry.dtype, read)


def _with_time(entry: LazyTensor) -> LazyTensor:
    return LazyTensor((entry.shape[0], entry.shape[1] + 1), entry.dtype, lambda: F.pad(entry.read(), (0, 1)))


def _repeated(entry: LazyTensor, frames: int) -> LazyTensor:
    def read() -> torch.Tensor:
        return torch.cat([entry.read()] * frames)

    return LazyTensor((frames * entry.shape[0], *entry.shape[1:]), entry.dtype, read)
