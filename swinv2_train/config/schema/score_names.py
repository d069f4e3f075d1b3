"""What names of scores say."""

from __future__ import annotations


def averaged_score(name: str) -> str:
    """The name of a score for the EMA of the weights (optim.ema_decay): val_ema/top1 for val/top1."""
    return name.replace("val/", "val_ema/", 1)


def lower_is_better(name: str) -> bool:
    """Whether a score is a loss or an error."""
    return name.endswith(("loss", "mae", "rmse"))
