"""Feature pyramid network (arXiv:1612.03144): all maps of an encoder with equally many channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models.detection.layers import ConvModule
from swinv2_train.models.initial_rules import xavier


class FPN(nn.Module):
    """in_channels: of the maps, the largest map first.  forward: (B, in_channels[i], h_i, w_i) each -> as many maps
    (B, channels, h_i, w_i), and every second place of the last as one more.

    1 x 1 convolutions, the sum with the coarser map by the nearest place, 3 x 3 convolutions (mmdetection).
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(
            ConvModule(width, channels, 1, xavier(width, channels), relu=False) for width in in_channels
        )
        rule = xavier(9 * channels, 9 * channels)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3, rule, relu=False) for _ in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=levels[i - 1].shape[2:], mode="nearest")
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=True)]
        return [*outputs, outputs[-1][:, :, ::2, ::2]]
