"""``python -m swinv2_train.export run_dir=DIR format=NAME out=PATH``: a run's weights, for everybody else to load.

  format=microsoft|timm out=FILE               .safetensors, or .pth as torch.save writes it
  format=timm out=DIR                          model.safetensors, config.json and README.md, as timm keeps it on a hub
  format=huggingface out=DIR                   model.safetensors, config.json, preprocessor_config.json, and README.md,
                                               the model card; license=NAME is what it says of the licence
  hub=USER/NAME                                and push that directory to the Hugging Face hub: hub_private=true makes
                                               the repository private, hub_revision=BRANCH is another one than main
  checkpoint=DIR                               another checkpoint than the newest
  ema=true                                     the averages of the run's weights (optim.ema_decay) in place of these
  weights=PATH [weights_format=NAME]           other weights of any known format; without run_dir the configuration is
                                               composed as the train command does: task=classify model=base ...;
                                               hf://USER/NAME[@REVISION][/FILE] are those of a hub

The weights are the float32 masters of the run, and one parameter at a time is in memory.  docs/weights.md has examples.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from swinv2_train.config import Config, ConfigError
from swinv2_train.config.command_line import compose_source, own_flag, run_on_weights
from swinv2_train.training.preflight import preflight
from swinv2_train.weights import WRITTEN_FORMATS
from swinv2_train.weights.export import ExportRequest, export

OWN_KEYS = tuple(field.name for field in dataclasses.fields(ExportRequest))


def parse(arguments: list[str]) -> tuple[Config, ExportRequest]:
    """The configuration and the command's own keys of a command line."""
    named = dict(argument.partition("=")[::2] for argument in arguments)
    if named.get("format", WRITTEN_FORMATS[0]) not in WRITTEN_FORMATS:
        raise ConfigError(f"format ({named['format']}) is not written; choose one of {', '.join(WRITTEN_FORMATS)}")
    if "weights" in named and "checkpoint" in named:
        raise ConfigError("weights and checkpoint are both given; leave one of them out")
    if "weights_format" in named and "weights" not in named:
        raise ConfigError("weights_format is of weights=PATH, which is not given; add it, or leave it out")
    config, given = compose_source(arguments, OWN_KEYS, {"format": "|".join(WRITTEN_FORMATS), "out": "PATH"})
    flags = {key: own_flag(given, key) for key in ("ema", "hub_private")}
    own: dict[str, Any] = {**given, "out": Path(given["out"]), **flags}
    return config, ExportRequest(**own)


def run(config: Config, request: ExportRequest) -> None:
    """Write what is asked for."""
    preflight(config, training=False)
    export(config, request)


def main() -> None:
    """The console script swinv2-export."""
    run_on_weights(__doc__, parse, run)


if __name__ == "__main__":
    main()
