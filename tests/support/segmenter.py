"""Images of many sizes with the classes of their pixels, a small segmenter, and what plain numpy says of both."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import torch

from swinv2_train.config import SegmentConfig
from swinv2_train.tasks.segment import SegmentTask

CLASSES, IGNORE = 5, 255
SIZES = [(70, 90), (50, 120), (41, 40), (64, 64), (33, 77), (90, 30), (48, 48)]
"""(height, width); odd sides, and no two ranks' images alike."""
SEGMENT = (
    "task=segment", f"task.num_classes={CLASSES}", "task.head_channels=16", "task.aux_channels=8",
    "task.resize_long_px=96", "task.resize_short_px=48", "model=tiny", "model.embed_dim=8", "model.depths=[1,1,1,1]",
    "model.num_heads=[1,2,4,8]", "model.img_size=32", "model.window_size=4", "model.drop_path_rate=0.1",
    "data=labelled", "train.epochs=null", "train.global_batch_size=6", "train.micro_batch_size=2",
    "train.max_steps=2", "optim.schedule.warmup_steps=1", "optim.lr=1e-3", "train.log_every_steps=1",
    "engine.precision=fp32", "log.wandb=disabled", "log.progress=none", "runtime.num_threads=1", "data.num_workers=0",
)  # fmt: skip

MODES = {
    "whole": (),
    "slide": ("task.eval_mode=slide", "task.eval_stride=20"),
    "several scales and flip": ("task.eval_scales=[0.5,1.0,1.25]", "task.eval_flip=true"),
    "slide over scales and flip": ("task.eval_mode=slide", "task.eval_scales=[1.0,1.5]", "task.eval_flip=true"),
}
"""Ways of evaluation."""


def scenes(count: int = len(SIZES), seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images uint8 (H, W, 3) and label images uint8 (H, W), 0 for what is ignored and k for class k - 1, in patches."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        patches = rng.integers(0, CLASSES + 1, (-(-height // 9), -(-width // 9)), dtype=np.uint8)
        labels = patches.repeat(9, axis=0).repeat(9, axis=1)[:height, :width]
        noise = rng.integers(0, 60, (height, width, 3))
        found.append(((noise + 35 * labels[..., None]).clip(0, 255).astype(np.uint8), labels))
    return found


def odd_scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    """A single pixel, two stripes, and an image of which no pixel counts."""
    rng = np.random.default_rng(7)
    sizes = [(1, 1), (3000, 20), (2, 700), (40, 50)]
    found = [
        (rng.integers(0, 256, (*size, 3), dtype=np.uint8), rng.integers(1, CLASSES + 1, size, dtype=np.uint8))
        for size in sizes
    ]
    found[-1][1][:] = 0
    return found


def write_scenes(path: Path, pairs: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """A shard of them, KEY.png and KEY.seg.png; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, pair in enumerate(pairs):
            for array, suffix in zip(pair, ("png", "seg.png"), strict=True):
                content = png(array)
                member = tarfile.TarInfo(f"scene{number:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


def png(array: np.ndarray) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    return content.getvalue()


def truth_of(labels: np.ndarray) -> np.ndarray:
    """What a label image says with reduce_zero_label: 0 is ignored, k is class k - 1."""
    return np.where(labels == 0, IGNORE, labels.astype(np.int64) - 1)


def randomised(task: SegmentTask) -> SegmentTask:
    """With weights that are all random: fresh ones make every block the identity, and every score nearly 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        scores = task.module.decoder.decode_head.conv_seg  # or one class would have the highest score everywhere
        image = torch.from_numpy(scenes(1)[0][0]).permute(2, 0, 1)
        said = task.module.eval()(task.normalise(image[None]))["logits"][0].flatten(1)
        scores.weight /= said.std(dim=1).view(-1, 1, 1, 1)
        scores.bias.copy_((scores.bias - said.mean(dim=1)) / said.std(dim=1))
    return task


# --------------------------------------------------------------------------------------------------------------------
# Evaluation in plain numpy: all scores of all pixels at once, in float64


def resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear without antialiasing: (..., h, w) -> (..., *size)."""
    for axis, new in ((-2, size[0]), (-1, size[1])):
        old = values.shape[axis]
        at = np.maximum((np.arange(new) + 0.5) * old / new - 0.5, 0)
        low = np.minimum(np.floor(at).astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        share = (at - low).reshape(-1, *[1] * (-axis - 1))
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return values


def model_scores(task: SegmentTask, image: np.ndarray) -> np.ndarray:
    """What the module says of an image, uint8 (C, h, w): its logits at its own size, (K, h, w) float64."""
    with torch.no_grad():
        logits = task.module.eval()(task.normalise(torch.from_numpy(image.copy())[None]))["logits"][0]
    return resized(logits.double().numpy(), image.shape[1:])


def slid(task: SegmentTask, image: np.ndarray, tile: int, stride: int) -> np.ndarray:
    """Of every tile, averaged: (K, h, w)."""
    _, height, width = image.shape
    total, times = np.zeros((CLASSES, height, width)), np.zeros((height, width))
    for row in range(max(height - tile + stride - 1, 0) // stride + 1):
        for column in range(max(width - tile + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + tile, height), min(column * stride + tile, width)
            top, left = max(bottom - tile, 0), max(right - tile, 0)
            total[:, top:bottom, left:right] += model_scores(task, image[:, top:bottom, left:right])
            times[top:bottom, left:right] += 1
    return total / times


def probabilities(task: SegmentTask, config: SegmentConfig, views: list[np.ndarray], size: tuple[int, int]):
    """Of every pixel of an image of this size: (K, *size)."""
    found = np.zeros((CLASSES, *size))
    flips = (False, True) if config.eval_flip else (False,)
    for view in views:
        for flip in flips:
            seen = view[:, :, ::-1] if flip else view
            tile, stride = task.tile[0], task.stride[0]
            scores = slid(task, seen, tile, stride) if config.eval_mode == "slide" else model_scores(task, seen)
            scores = resized(scores[:, :, ::-1] if flip else scores, size)
            scores = np.exp(scores - scores.max(axis=0))
            found += scores / scores.sum(axis=0)
    return found / (len(views) * len(flips))


def plain_scores(task: SegmentTask, pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Loss, mIoU, mean accuracy and share of right pixels by counting, class by class."""
    right, said, true, loss = np.zeros(CLASSES), np.zeros(CLASSES), np.zeros(CLASSES), 0.0
    for image, labels in pairs:
        row = task.eval_transform(
            torch.from_numpy(image).permute(2, 0, 1), {"segmentation": png(labels)}, np.random.default_rng(0)
        )
        found = probabilities(task, task.task, row["views"], labels.shape)
        truth = truth_of(labels)
        predicted = found.argmax(axis=0)
        for number in range(CLASSES):
            right[number] += ((truth == number) & (predicted == number)).sum()
            said[number] += ((predicted == number) & (truth != IGNORE)).sum()
            true[number] += (truth == number).sum()
        counted = truth != IGNORE
        loss -= np.log(np.take_along_axis(found, np.where(counted, truth, 0)[None], 0)[0][counted]).sum()
    with np.errstate(invalid="ignore"):
        return {
            "val/loss": loss / true.sum(),
            "val/miou": 100 * np.nanmean(right / (true + said - right)),
            "val/macc": 100 * np.nanmean(right / true),
            "val/aacc": 100 * right.sum() / true.sum(),
        }
