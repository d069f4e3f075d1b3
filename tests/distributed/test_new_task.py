"""A task from outside the package's own list: a schema class, an implementation, YAML and one line in the registry."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinv2_train import train
from swinv2_train.config import TASKS, Config, ConfigError, TaskConfig, command_line, pair
from swinv2_train.config.command_line import compose_overrides, guarded
from swinv2_train.data.sample import Targets
from swinv2_train.data.sources.base import Source
from swinv2_train.data.sources.pipe import Stream
from swinv2_train.models import SimMIM, SwinTransformerV2, multiply_adds
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.planning.trace import trace_step
from swinv2_train.tasks.encoder import build_model
from swinv2_train.tasks.inputs import ImageTransform, Normalise, meta_images
from swinv2_train.tasks.metrics import Metric, Rows, Sums
from swinv2_train.tasks.task import Batch, Forward
from swinv2_train.training.param_groups import build_param_groups
from swinv2_train.weights import load_weights, save_weights
from swinv2_train.weights.export import ExportRequest, export
from tests.support.evaluation import evaluate_command, evaluated, make_images, write_images
from tests.support.harness import run_distributed

LEVELS = 3
OVERRIDES = (
    "task=brightness", f"task.levels={LEVELS}", "model=demo", "model.embed_dim=8", "model.depths=[1,1]",
    "model.num_heads=[1,2]", "model.img_size=16", "model.window_size=2", "data=cifar10", "train.global_batch_size=8",
    "train.micro_batch_size=4", "train.max_steps=2", "train.epochs=null", "train.log_every_steps=1",
    "optim.schedule.warmup_epochs=0", "engine=zero3", "engine.precision=fp32", "engine.persistence_threshold=0",
    "log.wandb=disabled", "log.progress=none", "runtime.num_threads=1",
)  # fmt: skip


@dataclass
class BrightnessConfig(TaskConfig):
    """What conf/task/brightness.yaml holds."""

    levels: int

    implementation: ClassVar[str] = f"{__name__}:BrightnessTask"
    scores: ClassVar[tuple[str, ...]] = ("val/loss", "val/miou", "val/ap")

    def identity(self) -> dict[str, Any]:
        return {"task.levels": self.levels}

    def check(self, config: Config) -> None:
        if self.levels < 2:
            raise ConfigError(f"task.levels ({self.levels}) must be at least 2")


@dataclass(frozen=True, kw_only=True)
class BrightnessTransform(ImageTransform):
    needs: tuple[str, ...] = ("label",)

    def __call__(self, image: Tensor, targets: Targets, rng: np.random.Generator) -> dict[str, Any]:
        return {**super().__call__(image, targets, rng), "level": torch.tensor(targets["label"])}


class Brightness(nn.Module):
    def __init__(self, encoder: SwinTransformerV2, levels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.num_features, levels)

    def forward(self, images: Tensor, features: bool = False) -> Tensor:
        pooled = self.encoder.pooled_features(images)
        return pooled if features else self.head(pooled.to(self.head.weight.dtype))


def miou(matrix: Tensor) -> dict[str, float]:
    """(levels, levels): right level, predicted level."""
    right = matrix.diag().double()
    return {"val/miou": float((right / (matrix.sum(0) + matrix.sum(1) - right).clamp(min=1)).mean())}


def average_precision(rows: Tensor) -> dict[str, float]:
    """(images, 2): how bright an image is said to be, and whether it is of the brightest level."""
    hits = rows.flip(0)[:, 1]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return {"val/ap": float((precision * hits).sum() / hits.sum())}


class BrightnessTask:
    """Name the level of an image's brightness."""

    block_types = (SwinBlock,)
    predictions = None
    picture = None

    def __init__(self, config: Config, task: BrightnessConfig, device: torch.device) -> None:
        self.encoder = build_model(config.model, num_classes=0)
        self.module = Brightness(self.encoder, task.levels)
        self.multiply_adds = multiply_adds(self.encoder)
        self.normalise = Normalise(config.data.mean, config.data.std, device)
        img_size = pair("model.img_size", config.model.img_size)
        self.train_transform, self.eval_transform = (
            BrightnessTransform(config.data, img_size, train) for train in (True, False)
        )

    @staticmethod
    def preflight(task: BrightnessConfig) -> None:
        if task.levels == 99:
            raise ConfigError("task.levels (99) needs what is not installed")

    @staticmethod
    def check_source(task: BrightnessConfig, source: Source, key: str) -> None:
        if source.label_range is not None and source.label_range[1] >= task.levels:
            raise ConfigError(f"task.levels ({task.levels}) is too small for {key}")

    def notes(self, source: Source | Stream) -> Iterable[str]:
        return [f"levels {source.label_range}"]

    def begin(self, source: Source | Stream, names: tuple[str, ...] | None) -> None:
        return

    def meta_batch(self, size: int) -> dict[str, Tensor]:
        level = torch.empty(size, dtype=torch.int64, device="meta")
        return {**meta_images(size, self.encoder.img_size), "level": level}

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        return self._loss(self._logits(forward, batch), batch)

    def count(self, batch: Batch) -> float:
        return float(batch["weight"].sum())

    def scores(self, forward: Forward, batch: Batch) -> Mapping[str, Metric]:
        logits = self._logits(forward, batch)
        pairs = batch["level"] * LEVELS + logits.argmax(dim=1)
        matrix = F.one_hot(pairs, LEVELS**2).view(-1, LEVELS, LEVELS)
        ranked = torch.stack([logits[:, -1], (batch["level"] == LEVELS - 1).float()], dim=1)
        return {
            "val/loss": self._loss(logits, batch),
            "matrix": Sums(matrix, miou),
            "ranked": Rows(ranked, torch.arange(len(ranked)), average_precision),
        }

    def features(self, forward: Forward, batch: Batch) -> Tensor:
        return forward(images=self.normalise(batch["images"]), features=True)

    def _logits(self, forward: Forward, batch: Batch) -> Tensor:
        return forward(images=self.normalise(batch["images"])).float()

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        losses, weight = F.cross_entropy(logits, batch["level"], reduction="none"), batch["weight"]
        return (losses * weight).sum() / weight.sum().clamp(min=1e-12)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All that a new task needs: its line, and its files in conf/."""
    monkeypatch.setitem(TASKS, "brightness", BrightnessConfig)
    conf = shutil.copytree(command_line.conf_dir(), tmp_path / "conf")
    (conf / "task" / "brightness.yaml").write_text("defaults:\n  - common\n\nname: brightness\nlevels: 5\n")
    (conf / "optim" / "brightness.yaml").write_text("defaults:\n  - classify\n")
    monkeypatch.setattr(command_line, "conf_dir", lambda: conf)


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """17 training and 7 evaluation images, the labels 0 to 2 their levels."""
    patterns = {}
    for key, count in (("shards", 17), ("eval_shards", 7)):
        levels = [number % LEVELS for number in range(count)]
        images = make_images(count, len(key)) // 4 + 60 * np.array(levels, np.uint8)[:, None, None, None]
        patterns[key] = write_images(tmp_path / "images", key, images, levels)
    return [f"data.{key}={pattern}" for key, pattern in patterns.items()]


def test_a_task_from_outside_trains_under_zero_3_and_is_planned_and_evaluated(registered, shards, tmp_path, capfd):
    """Nothing else in the package knows it; its scores are a mean, a quotient of sums and an average precision."""
    run_dir = tmp_path / "run"
    config = compose_overrides([*OVERRIDES, *shards, f"run_dir={run_dir}", "train.keep_best=val/miou"])
    assert run_distributed(lambda _: guarded(lambda: train.train(config)), 2, init=False, timeout_sec=300) == [0, 0]
    assert "note: levels (0, 2)" in capfd.readouterr().out
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == [1, 2] and all(line["train/grad_norm"] > 0 for line in lines)
    scores = {name: lines[-1][name] for name in BrightnessConfig.scores}
    assert 0 < scores["val/loss"] < 2 and 0 < scores["val/miou"] <= 1 and 0 < scores["val/ap"] <= 1
    for ranks in (1, 2):
        line = evaluated(capfd, f"run_dir={run_dir}", ranks=ranks)
        assert line["images"] == 7 and {name: line[name] for name in scores} == pytest.approx(scores, rel=1e-5)
    parameters = sum(parameter.numel() for parameter in _task(config).module.parameters())
    assert run_distributed(lambda _: trace_step(config, 0.0).num_parameters, 1) == [parameters]
    for run, wrong, message in (
        ("run", "task.levels=2", "holds a run with task.levels=3, but this command has task.levels=2"),
        ("run", "task.levels=1", "task.levels (1) must be at least 2"),
        ("run", "task.levels=99", "task.levels (99) needs what is not installed"),
        ("run", "+task.num_classes=3", "unknown key task.num_classes: it belongs to task=classify"),
        ("new", "task.levels=2", "task.levels (2) is too small for data.shards"),
    ):
        overrides = [*OVERRIDES, *shards, f"run_dir={tmp_path / run}", "engine=local", wrong]
        command = lambda _, own=overrides: guarded(lambda: train.train(compose_overrides(own)))  # noqa: E731
        assert run_distributed(command, 1, init=False) == [2]
        assert message in capfd.readouterr().err
    with pytest.raises(ConfigError, match="task.name .brightness. has a model that no format holds"):
        export(config, ExportRequest("microsoft", tmp_path / "out.pth"))
    code, _, error = evaluate_command(capfd, f"run_dir={run_dir}", "crop_pcts=[1]")
    assert code == 2 and "crop_pcts compares accuracies, which task=brightness has not" in error


def test_its_encoder_takes_simmims_weights_and_its_head_starts_fresh(registered, tmp_path):
    """What a task adds to the encoder is told from it by name: head or decoder."""
    config = compose_overrides([*OVERRIDES, "data.shards=unused", f"run_dir={tmp_path}"])
    pretrained, path = SimMIM(_task(config).encoder, 8), tmp_path / "pretrained.safetensors"
    save_weights(pretrained, path, "microsoft")
    module = _task(config).module
    report = load_weights(module, path, head="auto")
    assert set(report.missing) == {"head.weight", "head.bias"}
    assert set(report.loaded) == {f"encoder.{name}" for name, _ in module.encoder.named_parameters()}
    assert torch.equal(module.encoder.norm.weight, pretrained.encoder.norm.weight)
    groups = build_param_groups(module, config.optim)
    assert {group["name"] for group in groups} >= {"layer_0_decay", "layer_1_decay", "layer_3_decay"}


def _task(config: Config) -> BrightnessTask:
    assert isinstance(config.task, BrightnessConfig)
    return BrightnessTask(config, config.task, torch.device("cpu"))
