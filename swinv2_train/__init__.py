"""swinv2_train: SimMIM pre-training and fine-tuning of Swin Transformer V2 at any size."""

import importlib
from typing import Any

__version__ = "0.2.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """The front door, opened when it is asked for: all modules import this one for its version."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("swinv2_train.inference"), name)
