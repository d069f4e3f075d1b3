"""A segmentation model by the names of Swin's own (SwinTransformer/Swin-Transformer-Semantic-Segmentation)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from swinv2_train.config import ConfigError
from swinv2_train.models import SwinTransformerV2
from swinv2_train.storage.lazy_tensors import LazyTensor
from swinv2_train.weights.names import ConvertedWeights, to_official

ENCODER, DECODER, NORMS, PYRAMID = "encoder.", "decoder.", "decoder.norms.", "decode_head.psp_modules."
_STAGE_NORM = re.compile(r"(.*?)backbone\.norm[0-9]+\.weight")
_STAGE = re.compile(r"backbone\.layers\.([0-9]{1,2})\.blocks\.[0-9]+\.attn\.")


def published_names(names: Iterable[str], encoder: SwinTransformerV2) -> dict[str, str]:
    """What each weight of a segmentation model on this encoder is called there: backbone.*, with the norms of its maps
    (the encoder's own is that of the last), decode_head.*, auxiliary_head.*.
    """
    last = {f"encoder.norm.{leaf}": f"backbone.norm{len(encoder.depths) - 1}.{leaf}" for leaf in ("weight", "bias")}
    return {name: last.get(name) or _published(name) for name in names}


def dense_to_official(
    entries: Mapping[str, LazyTensor], said: str | None, origin: str, left_out: Iterable[str]
) -> ConvertedWeights | None:
    """What to_official gives, of a file in which an encoder has a norm behind each stage: Swin's segmentation models,
    and detectors, of which the encoder alone is read.  None for any other file.
    """
    roots = {match[1] for name in entries if (match := _STAGE_NORM.fullmatch(name))}
    if len(roots) != 1:
        return None
    root = roots.pop()
    ours = _official([name.removeprefix(root) for name in entries if name.startswith(root)])
    if ours is None:
        return None
    sources = {ours[name]: root + name for name in ours}
    rest = [name for name in entries if name not in set(sources.values())]
    found = to_official({name: entries[source] for name, source in sources.items()}, said, origin, left_out)
    return ConvertedWeights(
        found.entries, origin, "microsoft",
        {name: tuple(sources[each] for each in given) for name, given in found.sources.items()},
        [*(sources.get(name, name) for name in found.left_out), *rest], f"{root}backbone.",
    )  # fmt: skip


def _official(names: list[str]) -> dict[str, str] | None:
    """Our names of what a segmentation model needs; None where a stage lacks blocks or the last one its norm."""
    stages = [int(match[1]) for name in names if (match := _STAGE.match(name))]
    last = f"backbone.norm{max(stages, default=-1)}."
    heads = any(name.startswith("decode_head.") for name in names)
    if not any(name.startswith(last) for name in names):
        return None
    found: dict[str, str] = {}
    for name in names:
        if name.startswith(last):
            found[name] = f"encoder.norm.{name.removeprefix(last)}"
        elif match := re.match(r"backbone\.norm([0-9]+)\.", name):
            if heads:
                found[name] = f"{NORMS}{match[1]}.{name[match.end() :]}"
        elif name.startswith("backbone."):
            found[name] = ENCODER + name.removeprefix("backbone.")
        elif name.startswith(("decode_head.", "auxiliary_head.")) and not name.endswith("num_batches_tracked"):
            found[name] = DECODER + re.sub(rf"^({re.escape(PYRAMID)}[0-9]+)\.1\.", r"\1.", name)
    return found


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
