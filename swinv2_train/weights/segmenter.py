"""A segmentation model by the names of Swin's own (SwinTransformer/Swin-Transformer-Semantic-Segmentation), which are
mmsegmentation's, and by those of transformers' UperNetForSemanticSegmentation.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

from swinv2_train.config import ConfigError
from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.batch_norm import BatchNorm
from swinv2_train.models.upernet import UPerNet

ENCODER, DECODER, NORMS, PYRAMID = "encoder.", "decoder.", "decoder.norms.", "decode_head.psp_modules."
SEGMENTATION_HEADS = ("decode_head.", "auxiliary_head.")
AUXILIARY = "decoder.auxiliary_head."
_CLASSES = "decoder.decode_head.conv_seg.weight"
_STAGE = re.compile(r"(?:^|\.)(?:layers|stages)\.([0-9]{1,9})\.")
_MAP_NORM = re.compile(r"(?:backbone\.)?norm([0-9]{1,9})\.(weight|bias)")


def published_names(names: Iterable[str], encoder: SwinTransformerV2) -> dict[str, str]:
    """What each weight of a segmentation model on this encoder is called there: backbone.*, with the norms of its maps
    (the encoder's own is that of the last), decode_head.*, auxiliary_head.*.
    """
    last = {f"encoder.norm.{leaf}": f"backbone.norm{len(encoder.depths) - 1}.{leaf}" for leaf in ("weight", "bias")}
    return {name: last.get(name) or _published(name) for name in names}


def dense_names(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Our names of what dense models have beside a plain backbone, in mmsegmentation's naming or transformers', and
    what of it is left out.

    names: without what stands before the whole model; a backbone's may begin with "backbone.".  The norms of the maps
    are norm0 to norm3: that of the last stage is the backbone's own, the others belong to segmentation heads.
    """
    names = list(names)
    heads = {name: _own_head(name) for name in names if name.startswith(SEGMENTATION_HEADS)}
    numbers = [int(match[1]) for name in names if (match := _STAGE.search(name))]
    found, beside = dict(heads), []
    for name in names:
        if match := _MAP_NORM.fullmatch(name):
            if int(match[1]) == max(numbers, default=0):
                found[name] = f"norm.{match[2]}"
            elif heads:
                found[name] = f"{NORMS}{match[1]}.{match[2]}"
            else:
                beside.append(name)
    return found, beside


def _own_head(name: str) -> str:
    bare = re.sub(rf"^({re.escape(PYRAMID)}[0-9]+)\.1\.", r"\1.", name)
    return DECODER + bare.replace(".batch_norm.", ".bn.").replace("_head.classifier.", "_head.conv_seg.")


def check_same_heads(theirs: Container[str], ours: Container[str], origin: str) -> None:
    """ConfigError for weights of a segmentation model whose heads compute something else than ours would with them.

    theirs, ours: names of weights, those of the encoder without "encoder.".
    """
    if _CLASSES not in theirs or _CLASSES not in ours:
        return
    for mark, with_it, without in (
        (f"{NORMS}0.weight", "norms of the encoder's maps; set task.map_norms=true",
         "no norms of the encoder's maps, as transformers' UPerNet; set task.map_norms=false"),
        (f"{DECODER}decode_head.bottleneck.bn.running_mean",
         "BatchNorms in the heads; set task.head_norm=sync_batch, or batch for one process",
         "no BatchNorms in the heads; set task.head_norm to what they were trained with, layer or group"),
    ):  # fmt: skip
        if (mark in theirs) != (mark in ours):
            raise ConfigError(f"{origin} has {with_it if mark in theirs else without}, or head=fresh for new heads")


def transformers_names(names: Iterable[str]) -> dict[str, str]:
    """What the weights of the heads are called in transformers' UperNetForSemanticSegmentation."""
    own = {name: _published(name) for name in names if name.startswith(DECODER)}
    return {
        name: theirs.replace(".bn.", ".batch_norm.").replace("_head.conv_seg.", "_head.classifier.")
        for name, theirs in own.items()
    }


def check_segmenter_format(format: str, model: UPerNet) -> None:
    """ConfigError for a format that cannot hold a segmentation model, or would compute something else with it."""
    if format == "timm":
        raise ConfigError(
            "format=timm cannot hold a segmentation model, for timm has no segmentation heads; export format=microsoft"
        )
    if format != "huggingface":
        return
    stages = len(model.encoder.depths)
    for refused, why in (
        (model.map_norms, "transformers' UPerNet takes the raw maps of its Swinv2Backbone, which has no norms behind "
         "the stages as this model (and Swin's own) has; one trained with task.map_norms=false can be exported"),
        (not isinstance(model.decoder.decode_head.bottleneck.bn, BatchNorm), "the norms of transformers' heads are "
         "BatchNorms; one trained with task.head_norm=sync_batch or batch can be exported"),
        (model.decoder.auxiliary_head is not None and stages != 4, "transformers' auxiliary head is on the third map, "
         f"and this encoder has {stages}"),
    ):  # fmt: skip
        if refused:
            raise ConfigError(
                f"format=huggingface cannot hold this segmentation model: {why}; export format=microsoft, whose names "
                "are those of Swin's segmentation models"
            )


def _published(name: str) -> str:
    if name.startswith(NORMS):
        return f"backbone.norm{name.removeprefix(NORMS)}"
    if name.startswith(ENCODER):
        return f"backbone.{name.removeprefix(ENCODER)}"
    bare = name.removeprefix(DECODER)
    if bare.startswith(PYRAMID):  # there a pooling comes before each convolution
        number, _, rest = bare.removeprefix(PYRAMID).partition(".")
        return f"{PYRAMID}{number}.1.{rest}"
    return bare
