"""Multiply-adds of a detector, as the published tables count them."""

from __future__ import annotations

from torch import nn

from swinv2_train.models.counts import multiply_adds
from swinv2_train.models.detection.heads import BOX_SIDE, MASK_SIDE
from swinv2_train.models.detection.rcnn import RCNN
from swinv2_train.models.detection.semantic import LEVEL

PROPOSALS, DETECTIONS = 1000, 100
"""Boxes and masks that published tables count."""


def rcnn_multiply_adds(model: RCNN) -> int:
    """Of one image's forward pass at encoder.img_size, 1,000 boxes and 100 masks: the encoder's, and the convolutions'
    and fully connected layers' of neck and heads.
    """
    encoder, decoder = model.encoder, model.decoder
    areas = [height * width for height, width in encoder.sizes]
    last = encoder.sizes[-1]
    every = [*areas, -(-last[0] // 2) * (-(-last[1] // 2))]
    total: int = multiply_adds(encoder)
    for convs in (decoder.neck.lateral_convs, decoder.neck.fpn_convs):
        total += sum(area * _weights(conv) for area, conv in zip(areas, convs, strict=True))
    total += sum(every) * _weights(decoder.rpn_head)
    head = decoder.roi_head
    if head.semantic_head is not None:
        total += areas[LEVEL] * _weights(head.semantic_head)
    for box in head.bbox_head:
        dense = _weights(box, nn.Linear)
        total += PROPOSALS * (dense + BOX_SIDE**2 * (_weights(box) - dense))
    for mask in head.mask_head:
        logits = _weights(mask.get_submodule("conv_logits"))
        total += DETECTIONS * MASK_SIDE**2 * (_weights(mask) - logits + 4 * logits)
    return total


def _weights(module: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...] | None = None) -> int:
    """Elements of the weights of a module's layers."""
    chosen = kinds or (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return sum(m.get_parameter("weight").numel() for m in module.modules() if isinstance(m, chosen))
