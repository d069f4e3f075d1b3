"""How each implementation calls the parts of a Swin V2, beside the official names.

Official names: patch_embed, layers.I.blocks.J, layers.I.downsample, norm, head; a SimMIM model has them behind
``encoder.``, and ``encoder.mask_token`` and ``decoder.0`` besides.  The norm on the main branch of huge and giant
(arXiv:2111.09883 section 3.6), which the official code does not have, is layers.I.blocks.J.norm3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

QKV = "attn.qkv.weight"
"""One of the official names that is not everyone's: queries, keys and values in one (3C, C)."""


@dataclass(frozen=True)
class Naming:
    """How one implementation calls the parts of the backbone, and its head."""

    prefix: str
    """Before the backbone's names in a complete model; a bare backbone goes without."""
    stages: str
    """What "layers" is called."""
    downsample_shift: int
    """0: a stage ends with the merging, as in the official code; 1: the next stage begins with it."""
    in_block: Mapping[str, str]
    """Beginnings of official names inside a block, and theirs."""
    outside: Mapping[str, str]
    """Beginnings of official names outside of the stages, and theirs."""

    def official(self, name: str) -> str | None:
        """The official name of one of theirs (without prefix); None when it is none."""
        match = re.fullmatch(rf"{re.escape(self.stages)}\.([0-9]+)\.(blocks\.[0-9]+|downsample)\.(.+)", name)
        if match is None:
            return _exchange(name, {theirs: ours for ours, theirs in self.outside.items()})
        stage, part, rest = int(match[1]), match[2], match[3]
        if part == "downsample":
            stage -= self.downsample_shift
            return f"layers.{stage}.downsample.{rest}" if stage >= 0 else None
        inside = _exchange(rest, {theirs: ours for ours, theirs in self.in_block.items()})
        return None if inside is None else f"layers.{stage}.{part}.{inside}"

    def theirs(self, name: str) -> str:
        """Their name (without prefix) of an official one; KeyError when they have none."""
        match = re.fullmatch(r"layers\.(\d+)\.(blocks\.\d+|downsample)\.(.+)", name)
        if match is None:
            found = _exchange(name, self.outside)
        elif match[2] == "downsample":
            found = f"{self.stages}.{int(match[1]) + self.downsample_shift}.downsample.{match[3]}"
        else:
            inside = _exchange(match[3], self.in_block)
            found = None if inside is None else f"{self.stages}.{match[1]}.{match[2]}.{inside}"
        if found is None:
            raise KeyError(name)
        return found


def _exchange(name: str, beginnings: Mapping[str, str]) -> str | None:
    for beginning, replacement in beginnings.items():
        if name.startswith(beginning):
            return replacement + name[len(beginning) :]
    return None


_ATTENTION = ("attn.logit_scale", "attn.cpb_mlp.", QKV, "attn.q_bias", "attn.v_bias", "attn.proj.")
_BLOCK = {name: name for name in (*_ATTENTION, "norm1.", "norm2.", "norm3.", "mlp.fc1.", "mlp.fc2.")}
_OUTSIDE = {name: name for name in ("patch_embed.proj.", "patch_embed.norm.", "norm.")}
_SIMMIM = {"mask_token": "mask_token", "decoder.0.": "decoder.0."}

OFFICIAL = Naming("encoder.", "layers", 0, _BLOCK, {**_OUTSIDE, "head.": "head.", **_SIMMIM})
TIMM = Naming("", "layers", 1, _BLOCK, {**_OUTSIDE, "head.": "head.fc."})
HUGGINGFACE = Naming(
    "swinv2.",
    "encoder.layers",
    0,
    {
        "attn.logit_scale": "attention.self.logit_scale",
        "attn.cpb_mlp.": "attention.self.continuous_position_bias_mlp.",
        "attn.q_bias": "attention.self.query.bias",
        "attn.v_bias": "attention.self.value.bias",
        "attn.proj.": "attention.output.dense.",
        "norm1.": "layernorm_before.",
        "norm2.": "layernorm_after.",
        "mlp.fc1.": "intermediate.dense.",
        "mlp.fc2.": "output.dense.",
    },
    {
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "patch_embed.norm.": "embeddings.norm.",
        "mask_token": "embeddings.mask_token",
        "norm.": "layernorm.",
        "head.": "classifier.",
        "decoder.0.": "decoder.0.",
    },
)


class _Torchvision(Naming):
    """torchvision numbers stages and mergings in one row: features.0 is the patch embedding, then they alternate."""

    def official(self, name: str) -> str | None:
        """As Naming's, of features.1.J, features.2.reduction and their like."""
        match = re.fullmatch(r"features\.([0-9]{1,9})\.(?:([0-9]+)\.)?(.+)", name)
        if match is None or match[1] == "0":
            return super().official(name)
        stage, merges = divmod(int(match[1]) - 1, 2)
        if merges == (match[2] is not None):
            return None  # a block has a number within its stage, a merging has none
        part = "downsample" if merges else f"blocks.{match[2]}"
        return super().official(f"features.{stage}.{part}.{match[3]}")


TORCHVISION = _Torchvision(
    "",
    "features",
    0,
    {
        **{name: name for name in (*_ATTENTION, "norm1.", "norm2.")},
        "mlp.fc1.": "mlp.0.",
        "mlp.fc2.": "mlp.3.",
    },
    {
        "patch_embed.proj.": "features.0.0.",
        "patch_embed.norm.": "features.0.2.",
        "norm.": "norm.",
        "head.": "head.",
    },
)


def mmpretrain_naming(num_stages: int) -> Naming:
    """mmpretrain numbers the final norm by the last stage; norm3 in a block is the extra norm, as with us."""
    attention = {name: name.replace("attn.", "attn.w_msa.") for name in _ATTENTION}
    norms = {name: name for name in ("norm1.", "norm2.", "norm3.")}
    return Naming(
        "backbone.",
        "stages",
        1,
        {**attention, **norms, "mlp.fc1.": "ffn.layers.0.0.", "mlp.fc2.": "ffn.layers.1."},
        {
            "patch_embed.proj.": "patch_embed.projection.",
            "patch_embed.norm.": "patch_embed.norm.",
            "norm.": f"norm{num_stages - 1}.",
            "head.": "head.fc.",
        },
    )
