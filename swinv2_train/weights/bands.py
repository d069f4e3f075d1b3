"""The patch embedding of weights for other channels than the model's, by a rule that the user knows.

For a grey image, whose channels are all alike, a convolution sees the sum of its weights over the channels: the rules
keep that sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from swinv2_train.config import ConfigError
from swinv2_train.storage.lazy_tensors import LazyTensor

PROJECTION = "patch_embed.proj.weight"
"""The one parameter (C, channels, patch, patch) that depends on the channels of the images."""

Bands = Literal["mean", "repeat", "fresh"] | Sequence[int]
"""mean: every channel takes the mean of the source's; repeat: the source's channels in turn, as timm does; either times
n/m for n channels in the source and m in the model.  A sequence: for each channel of the model the number of the
source's one, from 0, whose weights are divided by how often it is taken.  fresh: the model's own initial values."""


def adapted_bands(entry: LazyTensor, channels: int, bands: Bands, origin: str) -> LazyTensor:
    """A patch embedding's weight with `channels` input channels.

    entry: (C, n, patch, patch), of clips (C, n, frames, patch, patch); bands: not "fresh".  mean and a sequence that
    takes every channel keep the sum over the channels; so does repeat where n divides channels, or channels is 1.
    Raises ConfigError, naming bands and remedy, for a sequence that does not fit.
    """
    given = entry.shape[1]
    if isinstance(bands, str):
        if given == channels:
            return entry
        rows = [] if bands == "mean" or channels == 1 else [channel % given for channel in range(channels)]
        factors = [given / channels] * channels
    else:
        rows = list(bands)
        if len(rows) != channels:
            raise ConfigError(
                f"init_bands ({rows}) names {len(rows)} bands of {origin} for a model of {channels} channels; "
                "give one for each of the model's"
            )
        wrong = [row for row in rows if not 0 <= row < given]
        if wrong:
            raise ConfigError(
                f"init_bands ({rows}): {wrong[0]} is none of the {given} bands of {origin}; they are 0 to {given - 1}"
            )
        factors = [1 / rows.count(row) for row in rows]

    def read() -> Tensor:
        weight = entry.read()
        exact = weight.double()
        taken = exact[:, rows] if rows else exact.mean(1, keepdim=True).expand(-1, channels, *entry.shape[2:])
        shares = torch.tensor(factors, dtype=torch.float64).view(-1, *[1] * (exact.ndim - 2))
        return (taken * shares).to(weight.dtype)

    return LazyTensor((entry.shape[0], channels, *entry.shape[2:]), entry.dtype, read)


def adaptation(given: int, channels: int, bands: Bands) -> str:
    """What adapted_bands does, in words."""
    how = bands if isinstance(bands, str) else f"[{','.join(map(str, bands))}]"
    return f"the patch embedding's {given} channels became {channels} by init_bands={how}"
