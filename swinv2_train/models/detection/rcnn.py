"""Mask R-CNN and Cascade Mask R-CNN on SwinV2 (arXiv:1703.06870, arXiv:1906.09756), as mmdetection defines them.

Modules are named as there, below decoder; every stage's head has a number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train.models.detection.fpn import FPN
from swinv2_train.models.detection.objects import Objects
from swinv2_train.models.detection.roi import Pyramid, RoIHead, RoISettings
from swinv2_train.models.detection.rpn import RPNHead, proposals, rpn_losses, rpn_outputs
from swinv2_train.models.detection.semantic import semantic_loss
from swinv2_train.models.detection.suppress import Suppression
from swinv2_train.models.swin_v2 import SwinTransformerV2
from swinv2_train.models.upernet import MapLayerNorm

CHANNELS = 256
"""Of the pyramid and of every head (published)."""
SEMANTIC_WEIGHT = 0.2
"""Of the semantic branch's loss (published)."""


class RPNSettings(NamedTuple):
    """How boxes are proposed."""

    per_level: int
    """The best of each map in training, before NMS."""
    number: int
    """Proposals of an image in training."""
    eval_number: int
    """Both in evaluation."""
    inside_only: bool
    """Anchors that reach beyond the image are not learnt from."""
    beta: float
    """Below this a distance counts by its square; 0 = never."""


class DetectionDecoder(nn.Module):
    """The norms of an encoder's raw maps, the pyramid, and the heads on it.

    The last map's norm is the encoder's own, so that it starts from the pre-trained one.
    """

    def __init__(self, in_channels: list[int], settings: RoISettings, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(MapLayerNorm(width) for width in in_channels[:-1])
        self.neck = FPN(in_channels, channels)
        self.rpn_head = RPNHead(channels)
        self.roi_head = RoIHead(channels, settings, len(in_channels) + 1)


class RCNN(nn.Module):
    """An object detector on a SwinV2 encoder of two stages or more.

    In training mode the losses of each image; in evaluation mode detections, of constant number.
    Raises ValueError for numbers that do not fit.
    """

    def __init__(
        self,
        encoder: SwinTransformerV2,
        rpn: RPNSettings,
        roi: RoISettings,
        suppression: Suppression,
        channels: int = CHANNELS,
        semantic_weight: float = SEMANTIC_WEIGHT,
    ) -> None:
        super().__init__()
        if len(encoder.depths) < 2:
            raise ValueError(f"the encoder has {len(encoder.depths)} stage; a pyramid has the maps of 2 or more")
        self.encoder = encoder
        self.rpn, self.suppression, self.semantic_weight = rpn, suppression, semantic_weight
        in_channels = [encoder.embed_dim * 2**i for i in range(len(encoder.depths))]
        self.strides = [encoder.patch_size * 2**i for i in range(len(encoder.depths) + 1)]
        self.decoder = DetectionDecoder(in_channels, roi, channels)

    def forward(
        self,
        images: Tensor,
        extent: Tensor | None = None,
        boxes: Tensor | None = None,
        classes: Tensor | None = None,
        crowd: Tensor | None = None,
        draw: Tensor | None = None,
        masks: Tensor | None = None,
        semantic: Tensor | None = None,
        features: bool = False,
        suppress: bool = True,
    ) -> dict[str, Tensor]:
        """images: (B, in_chans, H, W), normalised pixels of any size; 0 is put at the bottom and the right to whole
        places of the coarsest map.  extent: (B, 2), the rows and columns that are of the image; None = all.

        Training: boxes to masks as in Objects; semantic, with that branch, as semantic_loss's labels;
        {"losses": (B, n) float32}.
        Evaluation: {"boxes": (B, D, 4), "scores": (B, D), "classes": (B, D), "finite": (B,)} as Detections has them,
        with masks "masks" (B, D, 28, 28), of probabilities within each box.  With suppress=False the last stage's boxes
        (B, P, K or 1, 4) and scores (B, P, K) as they are.  With boxes (B, D, 4) and classes (B, D): {"masks": ...} of
        these alone.
        With features: {"features": (B, num_features)}, the encoder's pooled_features.
        """
        if features:
            return {"features": self.encoder.pooled_features(images)}
        if extent is None:
            extent = torch.tensor([images.shape[2:]] * len(images), device=images.device)
        maps = self._maps(images)
        head, logits, embedding = self.decoder.roi_head, None, None
        if head.semantic_head is not None:
            logits, embedding = head.semantic_head(maps)
        pyramid = Pyramid(maps[:-1], self.strides[:-1], extent, images.shape[3], embedding)
        if not self.training and boxes is not None and classes is not None:
            return {"masks": head.masks(pyramid, boxes, classes)}
        outputs = rpn_outputs(self.decoder.rpn_head, maps, self.strides)
        if self.training:
            assert boxes is not None and classes is not None and crowd is not None and draw is not None, "no targets"
            objects = Objects(boxes, classes, crowd, draw, masks)
            found = proposals(outputs, extent, self.rpn.per_level, self.rpn.number)
            rpn = rpn_losses(outputs, objects, extent, self.rpn.inside_only, self.rpn.beta)
            losses = [rpn, head.losses(pyramid, found, objects)]
            if logits is not None:
                assert semantic is not None, "the semantic branch is learnt from labels of pixels"
                losses.append(self.semantic_weight * semantic_loss(logits, semantic).unsqueeze(1))
            return {"losses": torch.cat(losses, dim=1)}
        found = proposals(outputs, extent, self.rpn.eval_number, self.rpn.eval_number)
        candidates, scores = head.scored(pyramid, found)
        numbers = torch.cat(outputs.logits, dim=1).isfinite().all(dim=1)  # where none are, no box is proposed
        scores = torch.where(numbers.view(-1, 1, 1), scores, torch.nan)
        if not suppress:
            return {"boxes": candidates, "scores": scores}
        best = self.suppression(candidates, scores)
        detections = best._asdict()
        if head.settings.masks:
            detections["masks"] = head.masks(pyramid, best.boxes, best.classes)
        return detections

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The pyramid's maps, the largest first, and the one that anchors alone are on."""
        unit = self.strides[-2]
        images = F.pad(images, (0, -images.shape[3] % unit, 0, -images.shape[2] % unit))
        *raw, last = self.encoder.forward_features(images)
        normed = [norm(x) for norm, x in zip(self.decoder.norms, raw, strict=True)]
        return self.decoder.neck([*normed, last])
