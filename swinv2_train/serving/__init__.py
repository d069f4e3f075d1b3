"""Models for production: one file that runs without this package, checked against the model before it is there.

torch_export is a program that torch.export.load reads; onnx is a graph for onnxruntime and its like.
"""

from __future__ import annotations

from swinv2_train.serving.request import SERVED_FORMATS, ServingRequest, parse_request
from swinv2_train.serving.write import serve

__all__ = ["SERVED_FORMATS", "ServingRequest", "parse_request", "serve"]
