"""swinv2_train: SimMIM pre-training and fine-tuning of Swin Transformer V2 at any size."""

import importlib
from typing import Any

__version__ = "0.2.0"
__all__ = ["load", "train"]


def __getattr__(name: str) -> Any:
    """The front door, opened when it is asked for: all modules import this one for its version.

    __init__.pyi has the types.
    """
    if name == "train":  # a module that can be called: its import sets this package's attribute to it in any case
        return importlib.import_module("swinv2_train.train")
    if name == "load":
        return importlib.import_module("swinv2_train.inference").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
