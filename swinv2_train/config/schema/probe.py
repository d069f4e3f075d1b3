"""probe: quality of the frozen encoder's features, without fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from swinv2_train.config.rules import PATH, at_least, each, one_of, positive

PROBE_SCORES = {
    "knn": ("probe/knn_top1", "probe/knn_top5"),
    "linear": ("probe/linear_top1", "probe/linear_top5"),
}
"""What each of probe.methods measures of the encoder's features, in percent."""


@dataclass
class ProbeConfig:
    methods: Annotated[list[str], each(one_of(*PROBE_SCORES))]
    """Probes of the frozen encoder's mean-pooled features: knn, linear, both, or [] = none."""
    every_steps: Annotated[int | None, at_least(1)]
    """Steps between probes during training, and one at the end; null = at the end only."""
    before_first_step: bool
    """Also probe the weights that a new run starts from; the report sets these scores beside the last ones."""
    shards: Annotated[str | None, PATH]
    """Labelled images that the probes are fitted on, in data.shards' notation; null = data.shards."""
    eval_shards: Annotated[str | None, PATH]
    """Labelled images that the probes are scored on; null = data.eval_shards."""
    knn_neighbours: Annotated[int, at_least(1)]
    """Neighbours that vote (arXiv:1805.01978; DINO's usual choice: 20)."""
    knn_temperature: Annotated[float, positive()]
    """A neighbour's vote is exp(cosine similarity / this)."""
