"""UPerNet (arXiv:1807.10221) on SwinV2, with the auxiliary head of Swin's segmentation models.

The published construction (SwinTransformer/Swin-Transformer-Semantic-Segmentation), norms and initial values included;
modules are named as there, below decoder.

Legend: B batch, C channels of the encoder's first map, K classes, H W pixels per side, h_i w_i tokens of map i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models.batch_norm import BatchNorm, Total
from swinv2_train.models.counts import multiply_adds
from swinv2_train.models.precision import Float32LayerNorm, at_least_float32
from swinv2_train.models.resize import grid_means, resized
from swinv2_train.models.swin_v2 import SwinTransformerV2

POOLED_SIDES = (1, 2, 3, 6)
"""Grids over which the pyramid pooling module takes means (arXiv:1612.01105)."""
GROUPS = 32

NormOf = Callable[[int], nn.Module]
"""From a number of channels to the norm of maps (B, channels, H, W)."""


class HeadConv2d(nn.Conv2d):
    """A convolution that keeps the map's size and starts from a normal distribution around 0, its bias from 0.

    std: of that distribution; None = sqrt(2 / fan out), which keeps the variance of gradients behind a ReLU.
    """

    def __init__(self, channels_in: int, channels_out: int, side: int, bias: bool, std: float | None = None) -> None:
        super().__init__(channels_in, channels_out, side, padding=side // 2, bias=bias)
        self.initial_std = math.sqrt(2.0 / (channels_out * side**2)) if std is None else std
        nn.init.normal_(self.weight, std=self.initial_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class MapLayerNorm(Float32LayerNorm):
    """A LayerNorm over the channels of each place of a map: (B, C, H, W), whose memory is channels last."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MapGroupNorm(nn.GroupNorm):
    """A GroupNorm of 32 groups, or of as many as divide the channels, in at least float32; the weights' dtype.

    A group has two channels or more: one place of one channel has no variance.
    """

    def __init__(self, channels: int) -> None:
        groups = math.gcd(GROUPS, channels)
        super().__init__(max(1, channels // 2) if groups == channels else groups, channels)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        normed = F.group_norm(input.to(weight.dtype), self.num_groups, weight, bias, self.eps)
        return normed.to(self.weight.dtype)


def norm_of(kind: str, total: Total | None = None) -> NormOf:
    """The norm that task.head_norm names.  total: what adds up a tensor over all ranks (batch_norm.py), of sync_batch.

    Raises ValueError for another name.
    """
    kinds: dict[str, NormOf] = {
        "layer": MapLayerNorm,
        "group": MapGroupNorm,
        "batch": BatchNorm,
        "sync_batch": lambda channels: BatchNorm(channels, total),
    }
    if kind not in kinds:
        raise ValueError(f"no norm {kind!r}; there are: {', '.join(kinds)}")
    return kinds[kind]


class ConvNorm(nn.Module):
    """A convolution without bias, a norm and a ReLU: (B, channels_in, H, W) -> (B, channels_out, H, W)."""

    def __init__(self, channels_in: int, channels_out: int, side: int, norm: NormOf) -> None:
        super().__init__()
        self.conv = HeadConv2d(channels_in, channels_out, side, bias=False)
        self.bn = norm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class UPerHead(nn.Module):
    """All maps of an encoder to class scores at the resolution of the first.

    in_channels: of the maps.  forward: list of (B, in_channels[i], h_i, w_i) -> (B, K, h_0, w_0).
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float, norm: NormOf
    ) -> None:
        super().__init__()
        self.psp_modules = nn.ModuleList(ConvNorm(in_channels[-1], channels, 1, norm) for _ in POOLED_SIDES)
        self.bottleneck = ConvNorm(in_channels[-1] + len(POOLED_SIDES) * channels, channels, 3, norm)
        self.lateral_convs = nn.ModuleList(ConvNorm(width, channels, 1, norm) for width in in_channels[:-1])
        self.fpn_convs = nn.ModuleList(ConvNorm(channels, channels, 3, norm) for _ in in_channels[:-1])
        self.fpn_bottleneck = ConvNorm(len(in_channels) * channels, channels, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = HeadConv2d(channels, num_classes, 1, bias=True, std=0.01)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *lower, last = maps
        size = _size(last)
        pooled = [
            resized(module(grid_means(last, side)), size)
            for side, module in zip(POOLED_SIDES, self.psp_modules, strict=True)
        ]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, lower, strict=True)]
        levels.append(self.bottleneck(torch.cat([last, *pooled], dim=1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resized(levels[i], _size(levels[i - 1]))
        fused = [conv(level) for conv, level in zip(self.fpn_convs, levels, strict=False)]
        fused.append(levels[-1])
        size = _size(fused[0])
        x = self.fpn_bottleneck(torch.cat([resized(level, size) for level in fused], dim=1))
        return self.conv_seg(self.dropout(x))


class FCNHead(nn.Module):
    """One map to class scores of its own resolution: (B, channels_in, h, w) -> (B, K, h, w)."""

    def __init__(self, channels_in: int, channels: int, num_classes: int, dropout: float, norm: NormOf) -> None:
        super().__init__()
        self.convs = nn.ModuleList([ConvNorm(channels_in, channels, 3, norm)])
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = HeadConv2d(channels, num_classes, 1, bias=True, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return self.conv_seg(self.dropout(x))


class SegmentationDecoder(nn.Module):
    """The norms of an encoder's raw maps, UPerNet's head, and the auxiliary head on the last map but one.

    The last map's norm is the encoder's own, so that it starts from the pre-trained one.
    """

    auxiliary_head: FCNHead | None

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int,
        aux_channels: int,
        dropout: float,
        norm: NormOf,
        map_norms: bool,
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(MapLayerNorm(width) if map_norms else nn.Identity() for width in in_channels[:-1])
        self.decode_head = UPerHead(in_channels, channels, num_classes, dropout, norm)
        self.auxiliary_head = None
        if aux_channels:
            self.auxiliary_head = FCNHead(in_channels[-2], aux_channels, num_classes, dropout, norm)


class UPerNet(nn.Module):
    """A semantic segmentation model on a SwinV2 encoder of two stages or more.

    head_channels, aux_channels: of the two heads; without the second head where aux_channels is 0.  dropout: share of
    channels.  head_norm, total: as norm_of takes them.  map_norms: whether each map has a norm before the heads, as
    published; without, the encoder loses its last norm (transformers' UperNetForSemanticSegmentation).  Raises
    ValueError for numbers that do not fit.
    """

    def __init__(
        self,
        encoder: SwinTransformerV2,
        num_classes: int,
        head_channels: int = 512,
        aux_channels: int = 256,
        dropout: float = 0.1,
        head_norm: str = "layer",
        total: Total | None = None,
        map_norms: bool = True,
    ) -> None:
        super().__init__()
        if len(encoder.depths) < 2:
            raise ValueError(f"the encoder has {len(encoder.depths)} stage; UPerNet fuses the maps of 2 or more")
        self.encoder = encoder
        self.num_classes = num_classes
        in_channels = [encoder.embed_dim * 2**i for i in range(len(encoder.depths))]
        self.map_norms = map_norms
        if not map_norms:
            encoder.norm = nn.Identity()
        norm = norm_of(head_norm, total)
        self.decoder = SegmentationDecoder(
            in_channels, num_classes, head_channels, aux_channels, dropout, norm, map_norms
        )

    def forward(self, images: Tensor, features: bool = False) -> dict[str, Tensor]:
        """images: (B, in_chans, H, W), normalised pixels, of any size: 0 is put at the bottom and the right to whole
        patches of p pixels.

        Returns {"logits": (B, K, ceil(H/p), ceil(W/p))}, in training mode with "auxiliary", scores on the last map but
        one.  With features: {"features": (B, num_features)}, the encoder's pooled_features, of whole patches alone.
        """
        if features:
            return {"features": self.encoder.pooled_features(images)}
        patch = self.encoder.patch_size
        below, right = (-images.shape[2] % patch, -images.shape[3] % patch)
        if below or right:
            images = F.pad(images, (0, right, 0, below))
        *raw, last = self.encoder.forward_features(images)
        maps = [norm(x) for norm, x in zip(self.decoder.norms, raw, strict=True)]
        outputs = {"logits": self.decoder.decode_head([*maps, last])}
        if self.training and self.decoder.auxiliary_head is not None:
            outputs["auxiliary"] = self.decoder.auxiliary_head(maps[-1])
        return outputs


def upernet_multiply_adds(model: UPerNet) -> int:
    """Multiply-adds of one image's forward pass at encoder.img_size: the encoder's, and the head's convolutions.

    Without the auxiliary head, which is of training alone.  So Swin's paper counts (945 G for tiny at 512 x 2048).
    """
    encoder, head = model.encoder, model.decoder.decode_head
    areas = [height * width for height, width in encoder.sizes]
    at: list[tuple[nn.Module, int]] = [(head.bottleneck, areas[-1]), (head.fpn_bottleneck, areas[0])]
    at += zip(head.psp_modules, (side**2 for side in POOLED_SIDES), strict=True)
    at += zip((*head.lateral_convs, *head.fpn_convs), areas[:-1] * 2, strict=True)
    at.append((head.conv_seg, areas[0]))
    weights = ((each.weight, area) for module, area in at for each in module.modules() if isinstance(each, nn.Conv2d))
    return multiply_adds(encoder) + sum(weight.numel() * area for weight, area in weights)


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]
