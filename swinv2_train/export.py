"""``python -m swinv2_train.export run_dir=DIR format=NAME out=PATH``: a run's weights, for everybody else to load.

  format=microsoft|timm out=FILE               .safetensors, or .pth as torch.save writes it
  format=huggingface out=DIR                   model.safetensors, config.json, preprocessor_config.json
  checkpoint=DIR                               another checkpoint than the newest
  ema=true                                     the averages of the run's weights (optim.ema_decay) in place of these
  weights=PATH [weights_format=NAME]           other weights of any known format; without run_dir the configuration is
                                               composed as the train command does: task=classify model=base ...

The weights are the float32 masters of the run, and one parameter at a time is in memory.  docs/weights.md has examples.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swinv2_train.command_line import compose_source, own_flag, run_on_weights
from swinv2_train.config import Config, ConfigError, pair
from swinv2_train.models import SimMIM, SwinTransformerV2
from swinv2_train.models.initial import without_values
from swinv2_train.tasks import build_task
from swinv2_train.weights import WRITTEN_FORMATS, Preprocessing, match_weights, read_weights, save_weights


@dataclass(frozen=True)
class Request:
    """What the command line asks for besides the configuration."""

    format: str
    """One of WRITTEN_FORMATS."""
    out: Path
    """What is written; must not be there yet."""
    checkpoint: str | None = None
    """A checkpoint directory; None = the newest of the run."""
    weights: str | None = None
    """Weights of any known format in place of a checkpoint."""
    weights_format: str | None = None
    """The format of weights; None = by its names."""
    ema: bool = False
    """The averages of a run's weights in place of these."""


OWN_KEYS = tuple(field.name for field in dataclasses.fields(Request))


def export(config: Config, request: Request) -> list[Path]:
    """Write the weights that are asked for; returns the files.

    Raises ConfigError, with nothing written, when the weights are not the configured model's, when the format cannot
    hold it, and when out exists.
    """
    if request.out.exists():
        raise ConfigError(f"out ({request.out}) exists; name a new file or directory, or remove it")
    path = request.weights or request.checkpoint or config.run_dir
    source = read_weights(path, request.weights_format, averaged=request.ema)
    with without_values():
        module = build_task(config, torch.device("cpu")).module
    assert isinstance(module, SwinTransformerV2 | SimMIM)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    weights, _ = match_weights(source, shapes)
    data = config.data
    preprocessing = Preprocessing(
        mean=(data.mean[0], data.mean[1], data.mean[2]),
        std=(data.std[0], data.std[1], data.std[2]),
        img_size=pair("model.img_size", config.model.img_size),
        crop_pct=data.eval_crop_pct,
        squash=data.eval_crop == "squash",
        interpolation=data.interpolation,
    )
    files = save_weights(module, request.out, request.format, weights=weights, preprocessing=preprocessing)
    line = {
        "weights": source.origin,
        "ema": request.ema,
        "format": request.format,
        "files": [str(path) for path in files],
    }
    print(json.dumps(line))
    return files


def parse(arguments: list[str]) -> tuple[Config, Request]:
    """The configuration and the command's own keys of a command line."""
    named = dict(argument.partition("=")[::2] for argument in arguments)
    formats = "|".join(WRITTEN_FORMATS)
    for key, value in (("format", formats), ("out", "PATH")):
        if key not in named:
            raise ConfigError(f"{key} has no value; add {key}={value}")
    if named["format"] not in WRITTEN_FORMATS:
        raise ConfigError(f"format ({named['format']}) is not written; choose one of {', '.join(WRITTEN_FORMATS)}")
    if "weights" in named and "checkpoint" in named:
        raise ConfigError("weights and checkpoint are both given; leave one of them out")
    if "weights_format" in named and "weights" not in named:
        raise ConfigError("weights_format is of weights=PATH, which is not given; add it, or leave it out")
    config, given = compose_source(arguments, OWN_KEYS)
    own: dict[str, Any] = {**given, "out": Path(given["out"]), "ema": own_flag(given, "ema")}
    return config, Request(**own)


def main() -> None:
    """The console script swinv2-export."""
    run_on_weights(__doc__, parse, export)


if __name__ == "__main__":
    main()
