"""Where a run stands: its step, its images, and the loader that goes on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swinv2_train.data.loading.loader import TrainLoader
from swinv2_train.data.loading.mixed_order import MixedOrder
from swinv2_train.data.loading.pipe_loader import StreamLoader
from swinv2_train.data.sources.mixture import Mixture
from swinv2_train.distributed import all_reduce_sum
from swinv2_train.training.patience import Patience


@dataclass
class Position:
    """What a checkpoint keeps of a run besides the engine's state."""

    step: int
    """Completed optimizer steps."""
    images_seen: int
    """Images of all completed steps, over all ranks."""
    loader: TrainLoader | StreamLoader
    """This rank's micro-batches from here on."""
    device: torch.device
    """Where the ranks' numbers are added up."""
    first_batch_size: int
    """Images of the run's first step: the unit of its schedule (training/lr_schedule.py)."""
    batch_size: int
    """Images of a step of this start."""
    classes: tuple[str, ...] | None = None
    """What the rows of the model's head are called; None where they have numbers alone, or there is no head."""
    patience: Patience | None = None
    """How long train.keep_best has not become better; None where nobody asks."""
    bad_images: int = 0
    """Damaged samples of the run over all ranks and starts, when they were last counted."""
    _uncounted: int = 0  # those of this rank since then

    @property
    def is_out_of_patience(self) -> bool:
        """Whether train.patience ends the run here."""
        return self.patience is not None and self.patience.is_exhausted

    @property
    def source_names(self) -> tuple[str, ...]:
        """Of the sources that are mixed (data.mix); empty for one that is not."""
        mixture = getattr(self.loader, "manifest", None)
        return mixture.names if isinstance(mixture, Mixture) else ()

    def source_counts(self) -> dict[str, float]:
        """What each source of a mixture has contributed so far: mix/NAME/images, and mix/NAME/passes over it."""
        found: dict[str, float] = {}
        if isinstance(self.loader, TrainLoader) and isinstance(self.loader.order, MixedOrder):
            order = self.loader.order
            counted = zip(self.source_names, order.counted(self.images_seen), order.orders, strict=True)
            for name, images, own in counted:
                found |= {f"mix/{name}/images": images, f"mix/{name}/passes": images / own.num_samples}
        return found

    def shards_of_next_step(self) -> list[list[str]] | None:
        """The shard of each image of this rank's next step, by micro-batch; None of a pipe, which has none."""
        return self.loader.shards_of_step(self.images_seen) if isinstance(self.loader, TrainLoader) else None

    def advance(self, micro_batches: Sequence[dict[str, Any]]) -> None:
        """A step was completed: batch_size images of all ranks, of which micro_batches were this rank's."""
        self.step += 1
        self.images_seen += self.batch_size
        self._uncounted += sum(batch["num_bad"] for batch in micro_batches)

    def count_bad_images(self) -> None:
        """Add what all ranks met since the last count.  Collective.

        Raises SampleError on every rank when that is more than data.max_bad_fraction allows.
        """
        found = torch.tensor(float(self._uncounted), device=self.device)
        self.bad_images += int(all_reduce_sum(found))
        self._uncounted = 0
        self.loader.check_bad_images(self.bad_images, self.images_seen)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, for a checkpoint.  Collective, as the damaged samples are counted first."""
        self.count_bad_images()
        data = self.loader.state_dict(self.images_seen, self.bad_images)
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "first_batch_size": self.first_batch_size,
            "batch_size": self.batch_size,
            "data": data,
            "classes": self.classes,
            **({} if self.patience is None else {"patience": self.patience.state_dict()}),
        }

    def go_back(self, state: dict[str, Any]) -> None:
        """Return to what state_dict() gave at an earlier step."""
        self.step, self.images_seen = state["step"], state["images_seen"]
        if self.patience is not None:
            self.patience.go_back(state.get("patience"))
        self.loader = self.loader.restarted(self.images_seen)
        self.loader.check_state(state["data"])
        self.bad_images, self._uncounted = self.loader.bad_images_before, 0
