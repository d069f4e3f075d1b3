"""A small detector, crops with objects in them, and no need of any file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from swinv2_train.tasks import build_task
from tests.support.configs import composed

CLASSES, SIDE, PLACES = 3, 64, 4
DETECT = (
    "task=detect", f"task.num_classes={CLASSES}", f"task.max_objects={PLACES}", "task.head_channels=8",
    "task.head_width=16", "task.level_proposals=60", "task.proposals=40", "task.eval_proposals=30",
    "task.box_samples=16", "task.mask_samples=4", "task.detections=5", "task.eval_long_px=80", "task.eval_short_px=64",
    "model=tiny", "model.embed_dim=8", "model.depths=[1,1,1,1]", "model.num_heads=[1,2,4,8]", f"model.img_size={SIDE}",
    "model.window_size=4", "model.drop_path_rate=0.1", "data=labelled", "train.epochs=null",
    "train.global_batch_size=6", "train.micro_batch_size=2", "train.max_steps=2", "optim.schedule.warmup_steps=1",
    "optim.lr=1e-3", "train.log_every_steps=1", "engine.precision=fp32", "log.wandb=disabled", "log.progress=none",
    "runtime.num_threads=1", "data.num_workers=0",
)  # fmt: skip
CASCADE = ("task.head=cascade_mask_rcnn",)
HTC = (*CASCADE, "task.interleaved=true", "task.mask_flow=true", "task.class_agnostic=true", "task.box_loss=smooth_l1")
SEMANTIC = (*HTC, "task.semantic_classes=5")
HEADS = {
    "mask_rcnn": (),
    "boxes alone": ("task.masks=false",),
    "cascade": CASCADE,
    "cascade without norm": (*CASCADE, "task.head_norm=none"),
    "htc": HTC,
    "htc with its semantic branch": SEMANTIC,
}
"""Detectors by what is on."""


def detector(*overrides: str, device: str = "cpu"):
    """The task with weights that are all random, the same at every call."""
    torch.manual_seed(0)
    task = build_task(composed([*DETECT, "run_dir=x", "data.shards=unused", *overrides]), torch.device(device))
    return randomised(task)


def randomised(task):
    """Fresh weights make every block the identity, and every score nearly 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return task


def crops(counts: list[int], seed: int = 0, masks: bool = True) -> dict[str, Any]:
    """A training batch, an image for each number of objects: rectangles and ellipses of their class's grey.

    The last object of an image with three or more is a crowd.  The labels of the semantic branch are random.
    """
    rng = np.random.default_rng(seed)
    batch, columns = len(counts), -(-SIDE // 8)
    images = rng.integers(0, 40, (batch, 3, SIDE, SIDE))
    boxes, classes = np.zeros((batch, PLACES, 4), np.float32), np.full((batch, PLACES), -1)
    crowd, packed = np.zeros((batch, PLACES), bool), np.zeros((batch, PLACES, SIDE, columns), np.uint8)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    for b, count in enumerate(counts):
        for place in range(count):
            size, corner = rng.uniform(10, 40, 2), rng.uniform(0, SIDE - 40, 2)
            boxes[b, place] = (*corner, *(corner + size))
            classes[b, place] = rng.integers(CLASSES)
            crowd[b, place] = count >= 3 and place == count - 1
            (x0, y0), (x1, y1) = corner, corner + size
            shape = ((x - (x0 + x1) / 2) / (x1 - x0)) ** 2 + ((y - (y0 + y1) / 2) / (y1 - y0)) ** 2 < 0.25
            packed[b, place] = np.packbits(shape, axis=1)
            images[b][:, shape] += 70 * (classes[b, place] + 1)
    found = {
        "images": torch.from_numpy(images.clip(0, 255).astype(np.uint8)),
        "boxes": torch.from_numpy(boxes),
        "classes": torch.from_numpy(classes),
        "crowd": torch.from_numpy(crowd),
        "extent": torch.tensor([[SIDE, SIDE - 8 * (b % 2)] for b in range(batch)]),
        "draw": torch.from_numpy(rng.integers(2**31, size=batch)),
        "weight": torch.ones(batch),
        "semantic": torch.from_numpy(rng.choice([0, 1, 2, 3, 4, 255], (batch, SIDE // 8, SIDE // 8)).astype(np.uint8)),
    }
    return {**found, "masks": torch.from_numpy(packed)} if masks else found


def part(batch: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """Some images of a batch."""
    return {name: value[chosen] for name, value in batch.items()}
