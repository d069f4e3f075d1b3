"""HTC's semantic branch (arXiv:1901.07518, section 3.2): the classes of pixels, and what boxes and masks take of it.

Legend: B images, C channels, h w places of the pyramid's second map, S classes of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models.detection.layers import Conv, ConvModule
from swinv2_train.models.initial_rules import kaiming

LEVEL = 1
"""Of the pyramid's maps, the one whose size the branch has: stride 8 behind patches of 4."""
IGNORED = 255
"""The label of a place that is not learnt from."""
ROI_SIDE = 14
"""Of the features that a box takes from the branch, before they are averaged to what its head sees."""
_CONVS = 4


class SemanticHead(nn.Module):
    """maps (B, C, h_i, w_i), all of a pyramid -> logits (B, S, h, w) float32, and features (B, C, h, w) for the heads.

    Every map is resized to the second one, its corners in place, goes through a 1 x 1 convolution of its own, and all
    are summed; four 3 x 3 convolutions follow (mmdetection's fused head, named as there).
    """

    def __init__(self, channels: int, levels: int, num_classes: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(channels, channels, 1, kaiming(channels)) for _ in range(levels))
        rule = kaiming(9 * channels)
        self.convs = nn.ModuleList(ConvModule(channels, channels, 3, rule) for _ in range(_CONVS))
        self.conv_embedding = ConvModule(channels, channels, 1, kaiming(channels))
        self.conv_logits = Conv(channels, num_classes, 1, kaiming(num_classes))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        size = maps[LEVEL].shape[2:]
        resized = [
            x if i == LEVEL else F.interpolate(x, size, mode="bilinear", align_corners=True) for i, x in enumerate(maps)
        ]
        x = sum(conv(each) for conv, each in zip(self.lateral_convs, resized, strict=True))
        for conv in self.convs:
            x = conv(x)
        return self.conv_logits(x).float(), self.conv_embedding(x)


def semantic_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, the mean over its places that have a label, 0 where none has: (B,) float32.

    logits: (B, S, h, w).  labels: (B, h', w') of an integer type, h' <= h and w' <= w, IGNORED where there is none;
    places beyond them have none.
    """
    missing = (0, logits.shape[3] - labels.shape[2], 0, logits.shape[2] - labels.shape[1])
    labels = F.pad(labels.long(), missing, value=IGNORED)
    entropy = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    return entropy.sum(dim=(1, 2)) / (labels != IGNORED).sum(dim=(1, 2)).clamp(min=1)
