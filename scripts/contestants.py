"""The implementations of SwinV2 that scripts/benchmark.py compares, built with the same weights.

All start from one file with our model's weights under the official names; timm and transformers get them through our
own exports.  A new peer is one function here.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scripts.official_arithmetic import OfficialArithmetic
from swinv2_train.engine.compile import compile_blocks
from swinv2_train.models import SIZES, SwinTransformerV2, count_parameters, swin_v2
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.weights import load_weights, read_weights, save_weights

DROP_PATH_RATE = 0.1
PEERS = ("timm", "transformers", "torchvision")
PRODUCTS = "matrix products alone"


@dataclass(frozen=True)
class Case:
    """A model and a batch: size/px/window, as tiny/256/8, and images per step."""

    size: str
    img_size: int
    window_size: int
    batch_size: int

    @property
    def name(self) -> str:
        return f"{self.size}/{self.img_size}/{self.window_size}"

    def meta_model(self) -> SwinTransformerV2:
        """The model on the meta device, which tells the sizes."""
        with torch.device("meta"):
            return self.model()

    def model(self, **settings: Any) -> SwinTransformerV2:
        settings |= {"img_size": self.img_size, "window_size": self.window_size, "drop_path_rate": DROP_PATH_RATE}
        trained = (0,) * len(SIZES[self.size]["depths"]) if self.size in SIZES else ()
        return swin_v2(self.size, pretrained_window_sizes=trained, **settings)

    def weights_gib(self) -> float:
        """GiB of float32 weights."""
        return 4 * count_parameters(self.meta_model()) / 2**30

    def activations_gib(self) -> float:
        """Roughly what a training step in float32 keeps for its backward pass without recomputation.

        20 numbers a channel and 6 a score for every block, which is a little above what the official code keeps.
        """
        model = self.meta_model()
        numbers = 0
        for i, (grid, depth, heads) in enumerate(zip(model.grids, model.depths, model.num_heads, strict=True)):
            per_token = 20 * model.embed_dim * 2**i + 6 * heads * math.prod(grid.window)
            numbers += depth * math.prod(grid.padded) * per_token
        return 4 * self.batch_size * numbers / 2**30


@dataclass(frozen=True)
class Contestant:
    """One row of a table.

    implementation: ours, official, one of PEERS or PRODUCTS.  precision: fp32, bf16 (the weights too) or autocast
    (float32 weights under torch.autocast(bfloat16)).  tuned: in a process set up as our trainer sets up its own; ours
    always is.
    """

    implementation: str
    precision: str
    compiled: bool = False
    tuned: bool = False

    @property
    def name(self) -> str:
        words = {"official": "official arithmetic"}.get(self.implementation, self.implementation)
        if self.compiled:
            words += ", blocks compiled" if self.implementation == "ours" else ", compiled"
        return words + (", our process settings" if self.tuned else "")

    @property
    def weights_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def write_weights(case: Case, path: Path, device: torch.device) -> None:
    """A model's weights at random, as they might be after some training: no block is the identity, as it is at first.

    No logit scale is above its ceiling, where the double mask of transformers would show (docs/model.md).
    """
    torch.manual_seed(0)
    with device:
        model = case.model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1:
                parameter.normal_(std=0.1)
    save_weights(model, path, "microsoft")


def build(contestant: Contestant, case: Case, weights: Path, device: torch.device) -> nn.Module:
    """A module of images (B, 3, H, W) -> logits (B, classes) in training mode, on the device and compiled if asked for.

    Raises ImportError where the package is absent, ValueError where the implementation cannot express the model.
    """
    model = _BUILDERS[contestant.implementation](case, weights, device).to(device, contestant.weights_dtype).train()
    if contestant.compiled and contestant.implementation == "ours":
        compile_blocks(model, (SwinBlock,))
    elif contestant.compiled:
        model.compile(dynamic=False)
    return model


def _ours(case: Case, weights: Path, device: torch.device) -> nn.Module:
    with device:
        model = case.model(fused_attention=True)
    load_weights(model, weights)
    return model


def _official(case: Case, weights: Path, device: torch.device) -> nn.Module:
    with device:
        model = case.model()
    load_weights(model, weights)
    return OfficialArithmetic(model)


def _timm(case: Case, weights: Path, device: torch.device) -> nn.Module:
    from timm.models.swin_transformer_v2 import SwinTransformerV2 as Timm

    shape = case.meta_model()
    with tempfile.TemporaryDirectory() as folder:
        (path,) = save_weights(shape, Path(folder) / "timm.safetensors", "timm", weights=read_weights(weights))
        model = Timm(
            img_size=case.img_size, window_size=case.window_size, embed_dim=shape.embed_dim, depths=shape.depths,
            num_heads=shape.num_heads, drop_path_rate=DROP_PATH_RATE, num_classes=shape.num_classes,
        )  # fmt: skip
        model.load_state_dict(load_file(path))
    return model


class _Logits(nn.Module):
    """transformers' model without its output object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def _transformers(case: Case, weights: Path, device: torch.device) -> nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_weights(case.meta_model(), folder, "huggingface", weights=read_weights(weights))
        return _Logits(transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32))


def _torchvision(case: Case, weights: Path, device: torch.device) -> nn.Module:
    """torchvision lays windows of full size over smaller maps too, and lets the padding take part: another function
    than everybody else's.  So the attention of such a stage gets the window that the others use there.
    """
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    shape = case.meta_model()
    model = SwinTransformer(
        [shape.patch_size] * 2, shape.embed_dim, list(shape.depths), list(shape.num_heads), [case.window_size] * 2,
        stochastic_depth_prob=DROP_PATH_RATE, num_classes=shape.num_classes, block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )  # fmt: skip
    for i, grid in enumerate(shape.grids):
        for block in model.features[2 * i + 1]:
            block.attn.window_size = list(grid.window)
            block.attn.define_relative_position_bias_table()
            block.attn.define_relative_position_index()
    state = model.state_dict()
    source = read_weights(weights)
    for name in source:
        if not name.endswith("q_bias"):
            value = source[name]
            if name.endswith("v_bias"):
                value = torch.cat((source[name.replace("v_bias", "q_bias")], torch.zeros_like(value), value))
            state[_torchvision_name(name)].copy_(value)
    return model


def _torchvision_name(name: str) -> str:
    """torchvision's name of an official parameter; q_bias and v_bias are parts of its qkv.bias."""
    parts = name.split(".")
    if parts[0] == "patch_embed":
        parts[:2] = ["features", "0", "0" if parts[1] == "proj" else "2"]
    elif parts[0] == "layers":
        stage = int(parts[1])
        inner = parts[3:] if parts[2] == "blocks" else [str(2 * stage + 2), *parts[3:]]
        parts = ["features", *([str(2 * stage + 1)] if parts[2] == "blocks" else []), *inner]
    renamed = ".".join(parts).replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
    return renamed.replace("attn.v_bias", "attn.qkv.bias")


_BUILDERS: dict[str, Callable[[Case, Path, torch.device], nn.Module]] = {
    "ours": _ours,
    "official": _official,
    "timm": _timm,
    "transformers": _transformers,
    "torchvision": _torchvision,
}
