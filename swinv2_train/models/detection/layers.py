"""Layers of necks and heads that know what they start from (models/initial.py)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models.initial_rules import Normal, Rule, Uniform, kaiming, xavier
from swinv2_train.models.upernet import MapGroupNorm, MapLayerNorm

NORMS = {"layer": MapLayerNorm, "group": MapGroupNorm}


class Drawn(nn.Module):
    """Weights by the rule `initial`, biases 0."""

    initial: Rule

    def draw(self, rule: Rule) -> None:
        """Start from it."""
        self.initial = rule
        for name, parameter in self.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            elif isinstance(rule, Uniform):
                nn.init.uniform_(parameter, -rule.bound, rule.bound)
            elif isinstance(rule, Normal):
                nn.init.normal_(parameter, std=rule.std)


class Conv(nn.Conv2d, Drawn):
    """A convolution that keeps the map's size."""

    def __init__(self, channels_in: int, channels_out: int, side: int, rule: Rule, bias: bool = True) -> None:
        super().__init__(channels_in, channels_out, side, padding=side // 2, bias=bias)
        self.draw(rule)


class Fully(nn.Linear, Drawn):
    """A fully connected layer, Xavier uniform where no rule is given."""

    def __init__(self, width_in: int, width_out: int, rule: Rule | None = None) -> None:
        super().__init__(width_in, width_out)
        self.draw(xavier(width_in, width_out) if rule is None else rule)


class Upsample(nn.ConvTranspose2d, Drawn):
    """Twice the height and width, by a transposed convolution of 2 x 2."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 2, stride=2)
        self.draw(kaiming(4 * channels_in))  # mmcv takes the first two axes as of a convolution


class ConvModule(nn.Module):
    """A convolution, a norm where there is one, and a ReLU where it is wanted; named as mmcv's.

    norm: layer (over the channels of each place), group or none; with one the convolution has no bias.
    """

    def __init__(
        self, channels_in: int, channels_out: int, side: int, rule: Rule, norm: str = "none", relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = Conv(channels_in, channels_out, side, rule, bias=norm == "none")
        self.bn: nn.Module | None = None if norm == "none" else NORMS[norm](channels_out)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return F.relu(x) if self.relu else x


def weight_dtype(module: nn.Module) -> Any:
    """What the layers of a module compute in."""
    return next(module.parameters()).dtype
