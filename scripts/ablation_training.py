"""One run of scripts/ablations.py: a small SwinV2 or a variant of it on CIFAR-10, and what is measured of it.

The runs of a seed see the same images in the same crops and start from the same values, so variants are compared
pairwise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.ablation_models import with_parts
from swinv2_train.config import ConfigError, ScheduleConfig
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.data.shards.tar_reader import TarReader, open_manifest
from swinv2_train.data.transforms.crop import random_flip, random_resized_crop
from swinv2_train.data.transforms.decode import decode_image
from swinv2_train.models import SwinTransformerV2
from swinv2_train.runtime import tune_allocator
from swinv2_train.training.lr_schedule import lr_at
from swinv2_train.training.param_groups import no_decay_names

TABLE = "relative_position_bias_table"
NO_DECAY = ("1d", "cpb_mlp", "logit_scale", TABLE)  # the official code's
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
CROP_RATIO = (3 / 4, 4 / 3)  # width over height, as everywhere
PROBE_IMAGES = 500
"""Test images over which activations are measured."""
EVAL_BATCH = 100


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained, whatever is replaced in it."""

    img_size: int
    """Pixels of the training crops, which are resized to them."""
    patch_size: int
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int
    crop_scale: tuple[float, float]
    """Share of the area that a training crop keeps, at least and at most."""
    batch_size: int
    steps: int
    warmup_steps: int
    clip_grad_norm: float
    """Largest global norm of the gradient; 0 = no clipping."""
    table_lr_scale: float
    """What the lr is multiplied by for V1's position table: an entry moves by no more than the lr a step, while the
    hundreds of hidden units of a CPB move its bias together."""
    eval_sizes: tuple[tuple[int, int], ...]
    """(pixels, window) at which the test images are scored after the training."""

    def model(self, norm: str, attention: str, bias: str) -> SwinTransformerV2:
        """With initial values from torch's generator; 10 classes."""
        model = SwinTransformerV2(
            img_size=self.img_size,
            patch_size=self.patch_size,
            num_classes=10,
            embed_dim=self.embed_dim,
            depths=self.depths,
            num_heads=self.num_heads,
            window_size=self.window_size,
            drop_path_rate=0.0,
            pretrained_window_sizes=(0,) * len(self.depths),
            fused_attention=True,  # where a compiler is there: the reference within rounding, at 1.5 times its speed
        )
        return with_parts(model, norm, attention, bias)


@dataclass(frozen=True)
class Run:
    """One training: what is replaced, how fast it learns, and from which random numbers."""

    question: str
    norm: str
    attention: str
    bias: str
    lr: float
    seed: int
    recipe: Recipe

    @property
    def variant(self) -> str:
        return f"{self.norm}, {self.attention}, {self.bias}"

    @property
    def name(self) -> str:
        """A file name that no other run of the script has."""
        return f"{self.question}-{self.variant}-{self.lr:g}-{self.seed}".replace(", ", "-").replace(" ", "_")


def pack_images(out: Path, data: Path) -> Path:
    """All of CIFAR-10 as two tensors per split in one file, which the runs map into memory.

    data: the folder that scripts/fetch_cifar10.py packed.  Raises ShardError where it is not complete, and ConfigError
    where the runs in `out` are of other images.
    """
    path = out / "images.pt"
    manifests = {split: open_manifest(str(data / f"{split}-*.tar"), "--data") for split in ("train", "test")}
    content: dict[str, Any] = {"digests": {split: manifest.digest for split, manifest in manifests.items()}}
    if path.is_file():
        if torch.load(path, mmap=True).get("digests") != content["digests"]:
            raise ConfigError(f"--out={out}: its runs saw other images than --data={data} has; give another folder")
        return path
    for split, manifest in manifests.items():
        reader = TarReader(manifest)
        places = [(shard, index) for shard, count in enumerate(manifest.counts) for index in range(count)]
        images = torch.empty(len(places), 3, 32, 32, dtype=torch.uint8)
        labels = torch.empty(len(places), dtype=torch.int64)
        for number, (shard, index) in enumerate(places):
            sample = reader.read(shard, index)
            assert "label" in sample.targets, f"{sample.shard}: {sample.key} has no label"
            images[number], labels[number] = decode_image(sample.image, sample.extension), sample.targets["label"]
        reader.close()
        content[split] = (images, labels)
    config = compose_overrides(["experiment=cifar10_finetune"])
    content["mean"], content["std"] = (
        255 * torch.tensor(list(values)).view(3, 1, 1) for values in (config.data.mean, config.data.std)
    )
    part = path.with_suffix(".part")
    torch.save(content, part)
    return part.rename(path)


def batches(run: Run, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The run's batches: crops uint8 (B, 3, img_size, img_size) and labels (B,); every epoch uses every image once."""
    rng = np.random.default_rng(run.seed)
    recipe, size = run.recipe, (run.recipe.img_size, run.recipe.img_size)
    order = np.concatenate(
        [rng.permutation(len(images)) for _ in range(math.ceil(recipe.steps * recipe.batch_size / len(images)))]
    )
    for step in range(recipe.steps):
        chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        crops = []
        for index in chosen:
            crop = random_resized_crop(images[index], size, recipe.crop_scale, CROP_RATIO, "bicubic", rng)
            crops.append(random_flip(crop, 0.5, rng))
        yield torch.stack(crops), labels[chosen]


def train(run: Run, images_path: Path) -> dict[str, Any]:
    """Train, and measure; plain numbers, ready for JSON.  Sets the process to one thread.

    losses: per step; a last entry of None is one that was not finite, where the run ended.  amplitudes: standard
    deviation of the main branch behind every block, on test images, before and after the training (None where the loss
    was not finite).  scores: per size top-1 in percent and cross entropy.  bias_range: per block, largest less smallest
    position bias of a head, mean over the heads.
    """
    torch.set_num_threads(1)
    tune_allocator()
    content = torch.load(images_path, mmap=True)
    mean, std = content["mean"], content["std"]
    torch.manual_seed(run.seed)
    model = run.recipe.model(run.norm, run.attention, run.bias)
    test_images, test_labels = content["test"]
    probe = (resized(test_images[:PROBE_IMAGES], run.recipe.img_size) - mean) / std
    before = amplitudes(model, probe)
    started, started_cpu = time.perf_counter(), time.process_time()
    losses = fit(run, model, ((crops.sub(mean) / std, labels) for crops, labels in batches(run, *content["train"])))
    diverged = losses[-1] is None
    assert not (diverged and run.recipe.eval_sizes), f"{run.name}: the loss of step {len(losses)} is not finite"
    result: dict[str, Any] = {
        "run": asdict(run),
        "losses": losses,
        "images": len(losses) * run.recipe.batch_size,
        "train_cpu_sec": time.process_time() - started_cpu,
        "train_wall_sec": time.perf_counter() - started,
        "amplitudes": {"start": before, "end": None if diverged else amplitudes(model, probe)},
        "scores": {},
        "bias_range": bias_ranges(model),
    }
    for pixels, window in run.recipe.eval_sizes:
        model.set_input_size(pixels, window)
        result["scores"][f"{pixels}/{window}"] = score(model, test_images, test_labels, pixels, mean, std)
    result["eval_cpu_sec"] = time.process_time() - started_cpu - result["train_cpu_sec"]
    return result


def fit(run: Run, model: SwinTransformerV2, data: Iterator[tuple[Tensor, Tensor]]) -> list[float | None]:
    """AdamW under bf16 autocast, cosine schedule; returns the loss of every step."""
    recipe = run.recipe
    warmup = recipe.warmup_steps
    schedule = ScheduleConfig("cosine", warmup, None, warmup_lr=0.0, min_lr=0.0, milestones=[], gamma=0.1, power=1.0)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    patterns = [pattern for pattern in NO_DECAY if pattern == "1d" or any(pattern in name for name in named)]
    spared = no_decay_names({name: parameter.ndim for name, parameter in named.items()}, patterns)
    groups: dict[tuple[float, float], list[Tensor]] = {}  # by weight decay and share of the lr
    for name, parameter in named.items():
        scale = recipe.table_lr_scale if name.endswith(TABLE) else 1.0
        groups.setdefault((0.0 if name in spared else WEIGHT_DECAY, scale), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": decay, "scale": scale} for (decay, scale), params in groups.items()],
        lr=run.lr,
        fused=True,
    )
    losses: list[float | None] = []
    for step, (images, labels) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * lr_at(step, recipe.steps, schedule, warmup, run.lr)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING)
        if not math.isfinite(loss.item()):
            return [*losses, None]
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def amplitudes(model: SwinTransformerV2, images: Tensor) -> list[float]:
    """Standard deviation of the main branch behind every block, over all entries, in float32.

    images: (B, 3, H, W), normalised pixels.  The first entry is the map that enters the first block.
    """
    found: list[float] = []
    watched = [model.patch_embed, *(block for stage in model.layers for block in stage.blocks)]
    hooks = [module.register_forward_hook(lambda _module, _input, out: found.append(out.std().item()))
             for module in watched]  # fmt: skip
    model(images)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def bias_ranges(model: SwinTransformerV2) -> list[float]:
    """How far the position bias of each block reaches over the offsets of its trained window, mean over the heads."""
    tables = (
        block.attn.position_table(block.attn.pretrained_window_size, torch.device("cpu"))
        for stage in model.layers
        for block in stage.blocks
    )
    return [(table.amax(0) - table.amin(0)).mean().item() for table in tables]


@torch.no_grad()
def score(
    model: SwinTransformerV2, images: Tensor, labels: Tensor, pixels: int, mean: Tensor, std: Tensor
) -> dict[str, float]:
    """Top-1 in percent and cross entropy of uint8 images (N, 3, 32, 32), resized bicubically to `pixels`."""
    model.eval()
    hits, loss = 0, 0.0
    for start in range(0, len(images), EVAL_BATCH):
        batch, right = images[start : start + EVAL_BATCH], labels[start : start + EVAL_BATCH]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model((resized(batch, pixels) - mean) / std).float()
        hits += int((logits.argmax(1) == right).sum())
        loss += F.cross_entropy(logits, right, reduction="sum").item()
    return {"top1": 100 * hits / len(images), "loss": loss / len(images)}


def resized(images: Tensor, pixels: int) -> Tensor:
    """uint8 (N, 3, H, H) -> (N, 3, pixels, pixels), bicubic; untouched when they have the size."""
    if images.shape[-1] == pixels:
        return images
    return F.interpolate(images, (pixels, pixels), mode="bicubic", align_corners=False, antialias=True)
