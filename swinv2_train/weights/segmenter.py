"""A segmentation model by the names of Swin's own (SwinTransformer/Swin-Transformer-Semantic-Segmentation)."""

from __future__ import annotations

from collections.abc import Iterable

from swinv2_train.config import ConfigError
from swinv2_train.models import SwinTransformerV2

ENCODER, DECODER, NORMS, PYRAMID = "encoder.", "decoder.", "decoder.norms.", "decode_head.psp_modules."


def published_names(names: Iterable[str], encoder: SwinTransformerV2) -> dict[str, str]:
    """What each weight of a segmentation model on this encoder is called there: backbone.*, with the norms of its maps
    (the encoder's own is that of the last), decode_head.*, auxiliary_head.*.
    """
    last = {f"encoder.norm.{leaf}": f"backbone.norm{len(encoder.depths) - 1}.{leaf}" for leaf in ("weight", "bias")}
    return {name: last.get(name) or _published(name) for name in names}


def check_segmenter_format(format: str) -> None:
    """ConfigError for a format that cannot hold a segmentation model."""
    if format == "huggingface":
        raise ConfigError(
            "format=huggingface cannot hold this segmentation model: transformers' UperNet takes the raw maps of its "
            "Swinv2Backbone, which has no norms behind the stages as this model (and Swin's own) has; export "
            "format=microsoft, whose names are those of Swin's segmentation models"
        )
    if format == "timm":
        raise ConfigError(
            "format=timm cannot hold a segmentation model, for timm has no segmentation heads; export format=microsoft"
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
