"""When a run ends because train.keep_best gets no better: train.patience."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from swinv2_train.config import TrainConfig, lower_is_better


class Patience:
    """Counts the values in a row that are no better than the best before.  A checkpoint's state keeps it."""

    def __init__(self, train: TrainConfig, state: Mapping[str, Any] | None) -> None:
        """state: as go_back's."""
        self.metric, self.limit = train.keep_best, train.patience
        self.best: float | None = None
        self.worse = 0
        self.go_back(state)

    def go_back(self, state: Mapping[str, Any] | None) -> None:
        """state: what state_dict() gave, of another metric too, which begins anew; None = nothing was measured."""
        self.best, self.worse = None, 0
        if state is not None and state["metric"] == self.metric:
            self.best, self.worse = state["best"], state["worse"]

    @property
    def is_exhausted(self) -> bool:
        """Whether the run is to end."""
        return self.limit is not None and self.worse >= self.limit

    def add(self, scores: Mapping[str, float]) -> None:
        """What was measured at a step; nan is no better than anything."""
        value = scores.get(self.metric) if self.metric is not None else None
        if self.metric is None or value is None:
            return
        sign = -1 if lower_is_better(self.metric) else 1
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best):
            self.best, self.worse = value, 0
        else:
            self.worse += 1

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the same on every rank."""
        return {"metric": self.metric, "best": self.best, "worse": self.worse}

    def __str__(self) -> str:
        best = "none" if self.best is None else f"{self.best:.4g}"
        return f"train.patience ({self.limit}): {self.metric} was no better than {best} for {self.worse} evaluations"
