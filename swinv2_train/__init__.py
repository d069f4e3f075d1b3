"""swinv2_train: SimMIM pre-training and fine-tuning of Swin Transformer V2 at any size."""

from typing import Any

__version__ = "0.2.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """swinv2_train.load, imported when it is asked for: the commands of this package start without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from swinv2_train import inference

    return getattr(inference, name)
