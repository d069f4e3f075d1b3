"""A small training loader, and a transform as the tasks have them, for the tests of data sources."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import torch

from swinv2_train.config import DataConfig
from swinv2_train.data.loading.loader import TrainLoader
from swinv2_train.data.sample import Targets
from swinv2_train.data.sources.base import Source
from swinv2_train.data.transforms.crop import random_flip, random_resized_crop
from swinv2_train.data.transforms.masks import simmim_mask
from tests.support.configs import make_config

CONFIG = make_config(data={"lanes": 4, "window_shards": 2, "num_workers": 0, "max_bad_fraction": 0.5}).data


class Transform:
    """A crop, a flip, a mask and the label, as the tasks do it."""

    def __init__(self, needs_label: bool = True) -> None:
        self.needs = ("label",) if needs_label else ()

    def __call__(self, image: torch.Tensor, targets: Targets, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        crop = random_resized_crop(image, (8, 8), (0.3, 1.0), (0.75, 1.33), "bilinear", rng)
        row = {"image": random_flip(crop, 0.5, rng), "mask": simmim_mask((8, 8), 2, 1, 0.6, rng)}
        return {**row, "label": torch.tensor(targets["label"])} if self.needs else row


class PixelsAndDraw(Transform):
    """The image's own pixels cut to 8 x 8, a random number and the label: what the crop of Transform would hide."""

    def __call__(self, image: torch.Tensor, targets: Targets, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        row = {"image": image[:, :8, :8].contiguous(), "draw": torch.tensor(rng.random())}
        return {**row, "label": torch.tensor(targets["label"])} if self.needs else row


def train_loader(source: Source, config: DataConfig = CONFIG, **changes: Any) -> TrainLoader:
    """The loader of a process that is alone: steps of 12 images in micro-batches of 4, but for the changes."""
    options = {"seed": 5, "global_batch_size": 12, "micro_batch_size": 4, "rank": 0, "world_size": 1, "start_images": 0}
    return TrainLoader(source, config, changes.pop("transform", Transform()), **(options | changes))


def rows(loader: TrainLoader, batches: int) -> list[tuple[str, int, bytes]]:
    """Key, label and pixels of every row of the first batches, in order; closes the loader."""
    found = []
    for batch in islice(loader, batches):
        for i, key in enumerate(batch["keys"]):
            found.append((key, int(batch["label"][i]), batch["image"][i].numpy().tobytes()))
    loader.close()
    return found
