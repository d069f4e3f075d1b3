"""The heads of a box: its class and its exact place, and its mask (arXiv:1703.06870, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models.detection.layers import Conv, ConvModule, Fully, Upsample, weight_dtype
from swinv2_train.models.initial_rules import Normal, kaiming

BOX_SIDE, MASK_SIDE = 7, 14
"""Of the features of a box that each head sees; a mask has twice the side."""


class BoxHead(nn.Module):
    """Features (R, C, 7, 7) of boxes to class logits (R, K + 1), background last, and deltas (R, K or 1, 4), float32.

    convs: 3 x 3 convolutions (0, or 4 with norm as ConvModule takes it) before the fully connected layers, of which
    there are two of this width without convolutions and one with.  class_agnostic: the same deltas for every class.
    """

    def __init__(
        self, channels: int, num_classes: int, convs: int, norm: str, width: int, class_agnostic: bool
    ) -> None:
        super().__init__()
        rule = kaiming(9 * channels)
        self.shared_convs = nn.ModuleList(ConvModule(channels, channels, 3, rule, norm) for _ in range(convs))
        flat = channels * BOX_SIDE**2
        self.shared_fcs = nn.ModuleList([Fully(flat, width)] if convs else [Fully(flat, width), Fully(width, width)])
        self.fc_cls = Fully(width, num_classes + 1, Normal(0.01))
        self.fc_reg = Fully(width, 4 if class_agnostic else 4 * num_classes, Normal(0.001))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        x = features.to(weight_dtype(self.fc_cls))
        for conv in self.shared_convs:
            x = conv(x)
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return self.fc_cls(x).float(), self.fc_reg(x).float().view(len(x), -1, 4)


class MaskHead(nn.Module):
    """Features (R, C, 14, 14) of boxes to logits of a mask for each class, (R, K, 28, 28) float32.

    flow: HTC's mask information flow (arXiv:1901.07518, section 3.1): the head takes the features that the head before
    it has behind its convolutions.
    """

    def __init__(self, channels: int, num_classes: int, flow: bool) -> None:
        super().__init__()
        rule = kaiming(9 * channels)
        self.conv_res = ConvModule(channels, channels, 1, kaiming(channels)) if flow else None
        self.convs = nn.ModuleList(ConvModule(channels, channels, 3, rule) for _ in range(4))
        self.upsample = Upsample(channels, channels)
        self.conv_logits = Conv(channels, num_classes, 1, kaiming(num_classes))

    def features(self, x: Tensor, before: Tensor | None) -> Tensor:
        """Behind the convolutions: (R, C, 14, 14).  before: of the head before it."""
        x = x.to(weight_dtype(self.conv_logits))
        if self.conv_res is not None and before is not None:
            x = x + self.conv_res(before)
        for conv in self.convs:
            x = conv(x)
        return x

    def logits(self, features: Tensor) -> Tensor:
        """Of features(): (R, K, 28, 28) float32."""
        return self.conv_logits(F.relu(self.upsample(features))).float()


def of_class(values: Tensor, classes: Tensor) -> Tensor:
    """values (R, K or 1, ...) of each row's class (R,), whatever class where K is 1: (R, ...)"""
    kinds = values.shape[1]
    index = classes.clamp(0, kinds - 1) if kinds > 1 else torch.zeros_like(classes)
    shape = values.shape[2:]
    return values.gather(1, index.view(-1, 1, *[1] * len(shape)).expand(-1, 1, *shape)).squeeze(1)
