"""What the export command asks for, of a serving format."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import own_flag
from swinv2_train.weights.export import WrittenRequest

SUFFIXES = {"torch_export": ".pt2", "onnx": ".onnx"}
SERVED_FORMATS = tuple(SUFFIXES)
OPSETS = range(18, 24)
OPSET = 20
"""The first with Gelu as one operation; onnxruntime reads it since 1.17."""
ONNX_ALONE = ("opset", "int8", "calibration_images")
INT8 = ("dynamic", "static")


@dataclass(frozen=True)
class ServingRequest(WrittenRequest):
    """What the command line asks for besides the configuration; format is one of SERVED_FORMATS."""

    dynamic_size: bool = False
    """Images of any height and width, multiples of a step, in place of model.img_size."""
    preprocess: bool = False
    """The input is pixels as they are read, and the normalisation part of the graph."""
    opset: int = OPSET
    """Of ONNX."""
    int8: str | None = None
    """One of INT8: integers in the products of matrices; None = float32."""
    calibration_images: int = 128
    """Of int8=static: images of data.shards from which the ranges are taken."""


def parse_request(given: Mapping[str, str]) -> ServingRequest:
    """The request of a command's own keys.  Raises ConfigError for values and combinations that there are not."""
    own: dict[str, Any] = {**given, "out": Path(given["out"])}
    format, suffix = given["format"], SUFFIXES[given["format"]]
    if own["out"].suffix != suffix:
        raise ConfigError(f"out ({given['out']}) of format={format} must end in {suffix}")
    if foreign := [key for key in ONNX_ALONE if key in given and format != "onnx"]:
        raise ConfigError(f"{foreign[0]} is of format=onnx, not of format={format}; leave it out")
    own |= {key: own_flag(dict(given), key) for key in ("ema", "dynamic_size", "preprocess")}
    if "opset" in given:
        own["opset"] = _whole("opset", given["opset"])
        if own["opset"] not in OPSETS:
            raise ConfigError(f"opset ({own['opset']}) is not known; choose one of {OPSETS[0]} to {OPSETS[-1]}")
    if "int8" in given:
        kind = {"true": INT8[0]}.get(given["int8"].lower(), given["int8"])
        own["int8"] = None if kind == "false" else kind
        if own["int8"] not in (None, *INT8):
            raise ConfigError(f"int8 ({given['int8']}) must be true, {' or '.join(INT8)}")
    if "calibration_images" in given:
        if own.get("int8") != "static":
            raise ConfigError("calibration_images is of int8=static; leave it out")
        own["calibration_images"] = _whole("calibration_images", given["calibration_images"])
    check_packages(format)
    return ServingRequest(**own)


def check_packages(format: str) -> None:
    """ConfigError where a package is missing that the format takes."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if format == "onnx" and missing:
        raise ConfigError(f"format=onnx needs {', '.join(missing)}: pip install '.[serving]'")


def _whole(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{key} ({value}) must be a whole number of 1 or more")
    return int(value)
