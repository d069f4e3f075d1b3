"""What the export command takes of the serving formats, and what it says of the rest."""

from __future__ import annotations

import importlib.util

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.export import parse
from tests.support.evaluation import CLASSIFY, MODEL

GIVEN = (*CLASSIFY, *MODEL, "weights=w.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["format=onnx", "out=m.pt2"], r"out \(m.pt2\) of format=onnx must end in .onnx"),
        (["format=torch_export", "out=m.onnx"], r"of format=torch_export must end in .pt2"),
        (["format=onnx", "out=m.onnx", "opset=99"], r"opset \(99\) is not known; choose one of 18 to 23"),
        (["format=onnx", "out=m.onnx", "opset=new"], r"opset \(new\) must be a whole number"),
        (["format=torch_export", "out=m.pt2", "opset=20"], "opset is of format=onnx, not of format=torch_export"),
        (["format=timm", "out=m.pth", "dynamic_size=true"], "dynamic_size is of format=torch_export and onnx, not of"),
        (["format=onnx", "out=m.onnx", "preprocess=1"], r"preprocess \(1\) must be true or false"),
        (["format=onnx", "out=m.onnx", "int8=4bit"], r"int8 \(4bit\) must be true, dynamic or static"),
        (["format=onnx", "out=m.onnx", "calibration_images=9"], "calibration_images is of int8=static"),
    ],
)
def test_what_is_not_there_is_refused_with_the_remedy(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse([*GIVEN, *arguments])


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(ConfigError, match=r"format=onnx needs onnxruntime: pip install '.\[serving\]'"):
        parse([*GIVEN, "format=onnx", "out=m.onnx"])


def test_true_is_the_kind_of_int8_that_was_measured_best():
    assert parse([*GIVEN, "format=onnx", "out=m.onnx", "int8=true"])[1].int8 == "dynamic"
    assert parse([*GIVEN, "format=onnx", "out=m.onnx", "int8=false"])[1].int8 is None
