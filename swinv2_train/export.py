"""``python -m swinv2_train.export run_dir=DIR format=NAME out=PATH``: a run's weights, for everybody else to load.

  format=microsoft|timm out=FILE               .safetensors, or .pth as torch.save writes it
  format=timm out=DIR                          model.safetensors, config.json and README.md, as timm keeps it on a hub
  format=huggingface out=DIR                   model.safetensors, config.json, preprocessor_config.json, and README.md,
                                               the model card; license=NAME is what it says of the licence
  hub=USER/NAME                                and push that directory to the Hugging Face hub: hub_private=true makes
                                               the repository private, hub_revision=BRANCH is another one than main
  format=torch_export out=FILE.pt2             a program that torch alone runs, checked against the model
  format=onnx out=FILE.onnx                    a graph for onnxruntime, checked too; [opset=N] [int8=dynamic|static]
  dynamic_size=true preprocess=true            of these two: images of any size; pixels in place of normalised images
  checkpoint=DIR                               another checkpoint than the newest
  ema=true                                     the averages of the run's weights (optim.ema_decay) in place of these
  weights=PATH [weights_format=NAME]           other weights of any known format; without run_dir the configuration is
                                               composed as the train command does: task=classify model=base ...;
                                               hf://USER/NAME[@REVISION][/FILE] are those of a hub

The weights are the float32 masters of the run, and one parameter at a time is in memory.  docs/weights.md and
docs/serving.md have examples.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from swinv2_train.config import Config, ConfigError
from swinv2_train.config.command_line import compose_source, own_flag, run_on_weights
from swinv2_train.serving import SERVED_FORMATS, ServingRequest, parse_request, serve
from swinv2_train.training.preflight import preflight
from swinv2_train.weights import WRITTEN_FORMATS
from swinv2_train.weights.export import ExportRequest, export

FORMATS = (*WRITTEN_FORMATS, *SERVED_FORMATS)
KEYS = {
    format: {field.name for field in dataclasses.fields(ServingRequest if format in SERVED_FORMATS else ExportRequest)}
    for format in FORMATS
}
OWN_KEYS = tuple(sorted(set().union(*KEYS.values())))


def parse(arguments: list[str]) -> tuple[Config, ExportRequest | ServingRequest]:
    """The configuration and the command's own keys of a command line."""
    named = dict(argument.partition("=")[::2] for argument in arguments)
    if named.get("format", FORMATS[0]) not in FORMATS:
        raise ConfigError(f"format ({named['format']}) is not written; choose one of {', '.join(FORMATS)}")
    if "weights" in named and "checkpoint" in named:
        raise ConfigError("weights and checkpoint are both given; leave one of them out")
    if "weights_format" in named and "weights" not in named:
        raise ConfigError("weights_format is of weights=PATH, which is not given; add it, or leave it out")
    config, given = compose_source(arguments, OWN_KEYS, {"format": "|".join(FORMATS), "out": "PATH"})
    for key in given:
        if key not in KEYS[given["format"]]:
            formats = " and ".join(format for format in FORMATS if key in KEYS[format])
            raise ConfigError(f"{key} is of format={formats}, not of format={given['format']}; leave it out")
    if given["format"] in SERVED_FORMATS:
        return config, parse_request(given)
    flags = {key: own_flag(given, key) for key in ("ema", "hub_private")}
    own: dict[str, Any] = {**given, "out": Path(given["out"]), **flags}
    return config, ExportRequest(**own)


def run(config: Config, request: ExportRequest | ServingRequest) -> None:
    """Write what is asked for."""
    preflight(config, training=False)
    if isinstance(request, ServingRequest):
        serve(config, request)
    else:
        export(config, request)


def main() -> None:
    """The console script swinv2-export."""
    run_on_weights(__doc__, parse, run)


if __name__ == "__main__":
    main()
