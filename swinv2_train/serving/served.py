"""What is served of a task's model: one tensor in, one tensor out, and what is to be known of both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train import __version__
from swinv2_train.config import Config, ConfigError, per_band
from swinv2_train.models import SimMIM, SwinTransformerV2
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.upernet import UPerNet
from swinv2_train.serving.any_size import size_step, takes_any_size
from swinv2_train.tasks.task import Task

INPUT = "images"
AFTER = {"single": "softmax", "multilabel": "sigmoid"}
"""What makes probabilities of logits, by task.target."""


class Served(nn.Module):
    """A task's module in evaluation mode: (N, C, H, W), of clips (N, 3, T, H, W), -> what `output` names.

    logits: (N, classes), of a segmentation (N, classes, H, W).  values: (N, K), numbers in the units of their labels.
    features: (N, 8C), the encoder's pooled features.  normalise: the input is pixels as they are read.
    """

    std: Tensor
    mean: Tensor

    def __init__(self, task: Task, config: Config, normalise: bool) -> None:
        super().__init__()
        self.module = task.module
        self.normalise = task.normalise if normalise else None
        target = getattr(config.task, "target", None)
        self.output = "logits"
        if isinstance(self.module, SimMIM):
            self.output = "features"
        elif target == "regression":
            self.output = "values"
            self.register_buffer("std", torch.tensor(config.task.value_std or [1.0]))  # type: ignore[attr-defined]
            self.register_buffer("mean", torch.tensor(config.task.value_mean or [0.0]))  # type: ignore[attr-defined]

    def forward(self, images: Tensor) -> Tensor:
        x = images if self.normalise is None else self.normalise(images)
        if isinstance(self.module, SimMIM):
            return self.module.encoder.pooled_features(x)
        if isinstance(self.module, UPerNet):
            logits = self.module(x)["logits"]
            return F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=False)
        out: Tensor = self.module(x)
        return out * self.std + self.mean if self.output == "values" else out

    @property
    def encoder(self) -> SwinTransformerV2:
        found = self.module if isinstance(self.module, SwinTransformerV2) else self.module.encoder
        assert isinstance(found, SwinTransformerV2)
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of the input."""
        return torch.uint8 if self.normalise is not None and self.normalise.factor is None else torch.float32

    def input_like(self, batch: int, sides: tuple[int, ...], seed: int = 0) -> Tensor:
        """Random images of normal numbers, or of pixels: (batch, C, *sides)."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, self.encoder.in_chans, *sides)
        if self.dtype == torch.uint8:
            return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return torch.randn(shape, generator=generator)

    def for_tracing(self, any_size: bool) -> None:
        """Attend by plain operations of torch from now on, of images of any size or of the model's own."""
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.fused, module.chunks = False, None
        if any_size:
            takes_any_size(self.encoder)


def check_served(config: Config, task: Task, dynamic_size: bool) -> None:
    """ConfigError for models that have no such form, with what to do instead."""
    module, name = task.module, config.task.name
    if not isinstance(module, SwinTransformerV2 | SimMIM | UPerNet):
        raise ConfigError(
            f"task={name}: a detector chooses boxes by loops over what it has found, which no graph of fixed shapes "
            "holds; serve it in Python (swinv2_train.load) or by swinv2-predict"
        )
    if not dynamic_size:
        return
    why = None
    if config.model.frames is not None:
        why = "a model of clips has windows in time, which are laid for model.frames"
    elif isinstance(module, UPerNet):
        why = "the head of a segmentation averages over grids that are laid for model.img_size"
    if why is not None:
        raise ConfigError(
            f"dynamic_size=true: {why}; write a file a size: leave it out, and set model.img_size=[HEIGHT,WIDTH]"
        )


def described(
    config: Config, task: Task, served: Served, classes: tuple[str, ...] | None, any_size: bool
) -> dict[str, Any]:
    """What a program must know to use the file, as JSON holds it."""
    encoder, data = served.encoder, config.data
    sides: list[Any] = list(encoder.input_size)
    if any_size:
        sides = ["height", "width"]
    raw = served.normalise is not None
    size = list(encoder.img_size)
    out = {"logits": [served_rows(task)], "values": [served_rows(task)], "features": [encoder.num_features]}
    maps = size if isinstance(served.module, UPerNet) else []
    description: dict[str, Any] = {
        "made_by": f"swinv2_train {__version__}",
        "task": config.task.name,
        "input": {
            "name": INPUT,
            "shape": ["batch", encoder.in_chans, *sides],
            "dtype": str(served.dtype).removeprefix("torch."),
            "normalised": not raw,
        },
        "output": {"name": served.output, "shape": ["batch", *out[served.output], *maps], "dtype": "float32"},
        "classes": None if classes is None else list(classes),
        "preprocessing": {
            "size": size, "crop": None if maps else data.eval_crop, "crop_pct": None if maps else data.eval_crop_pct,
            "interpolation": data.interpolation, "mean": data.mean, "std": data.std, "scale": _scale(config),
        },
    }  # fmt: skip
    if config.model.frames is not None:  # of a clip's file these many, from the middle
        description["preprocessing"] |= {"frames": config.model.frames, "frame_stride": data.frame_stride}
    if served.output == "logits" and isinstance(served.module, SwinTransformerV2):
        description["output"]["probabilities"] = AFTER[config.task.target]  # type: ignore[attr-defined]
        if config.task.target == "multilabel":  # type: ignore[attr-defined]
            description["output"]["threshold"] = config.task.threshold  # type: ignore[attr-defined]
    if any_size:
        step = size_step(encoder)
        description["input"] |= {"multiple_of": step, "at_least": 2 * step}
    return description


def served_rows(task: Task) -> int:
    """Classes or numbers of the output."""
    module = task.module
    return 0 if isinstance(module, SimMIM) else int(module.num_classes)  # type: ignore[arg-type]


def _scale(config: Config) -> dict[str, Any]:
    """What is done to the files' numbers before mean and std: photographs' pixels become 0 to 1."""
    if not config.reads_values:
        return {"factor": 1 / 255, "offset": 0.0}
    scale, count = config.data.scale, config.model.in_chans
    nodata = None if config.data.nodata is None else list(map(str, config.data.nodata))  # JSON has no nan
    return {
        "factor": per_band(scale.factor, count, 1.0), "offset": per_band(scale.offset, count, 0.0), "clip": scale.clip,
        "nodata": nodata,
    }  # fmt: skip
