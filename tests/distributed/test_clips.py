"""Clips through the commands: classes of motion and SimMIM, resumed bit for bit and on other ranks, seen in views."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from swinv2_train import train
from swinv2_train.checkpoint import find_checkpoint, read_checkpoint_weights
from swinv2_train.config.command_line import guarded
from swinv2_train.data.clips.frames_file import pack_frames
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.transforms.decode import decode_image
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.tasks import build_task
from tests.support.clips import jpeg
from tests.support.configs import composed
from tests.support.evaluation import evaluated
from tests.support.harness import run_distributed

FRAMES, STRIDE, SIDE = 4, 2, 16
EVALUATED, LONG = 5, 12
"""Clips of the evaluation, and their frames."""
CLIPS = (
    "model=demo", "model.embed_dim=8", "model.depths=[1,1]", "model.num_heads=[1,2]", f"model.img_size={SIDE}",
    "model.window_size=2", "model.pretrained_window_sizes=[0,0]", "model.drop_path_rate=0", f"model.frames={FRAMES}",
    "model.patch_frames=2", "model.window_frames=2", "data=labelled", f"data.frame_stride={STRIDE}",
    "data.eval_crop_pct=1", "data.num_workers=0", "train.global_batch_size=4", "train.micro_batch_size=2",
    "train.max_steps=4", "train.checkpoint_every_steps=2", "train.keep_checkpoints=3", "train.log_every_steps=1",
    "train.picture_every_steps=2", "optim.schedule.warmup_steps=1", "optim.lr=1e-3", "runtime.num_threads=1",
    "log.wandb=disabled", "log.progress=none", "engine=zero3", "engine.persistence_threshold=0",
    "engine.precision=fp32",
)  # fmt: skip
TASKS = {
    "classify": ("task=classify", "task.num_classes=2", "task.mixup_alpha=0", "task.cutmix_alpha=0",
                 "task.erasing_prob=0", "task.rand_augment=null", "model.recompute=blocks"),
    "simmim": ("task=simmim", "task.mask_unit_px=4", "task.mask_ratio=0.75"),
}  # fmt: skip


def moving(number: int, frames: int) -> list[np.ndarray]:
    """Frames uint8 (16, 24, 3) of a bar that goes to the right (class 0) or to the left (class 1) over noise."""
    rng = np.random.default_rng(number)
    still = rng.integers(0, 90, (SIDE, 24, 3), dtype=np.uint8)
    found = []
    for time in range(frames):
        frame = still.copy()
        place = (3 * time if number % 2 == 0 else -3 * time) + int(number)
        frame[:, np.arange(place, place + 4) % 24] = 230
        found.append(frame)
    return found


def clip_rows(first: int, count: int, frames: int):
    for number in range(first, first + count):
        data = pack_frames([jpeg(frame) for frame in moving(number, frames)])
        yield f"k{number:03d}", data, "frames", number % 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("clips")
    write_shards(clip_rows(0, 12, 9), str(folder / "train"), 4)
    write_shards(clip_rows(100, EVALUATED, LONG), str(folder / "val"), 2)
    (folder / "classes.txt").write_text("right\nleft\n")
    return f"data.shards={folder}/train-*.tar", f"data.eval_shards={folder}/val-*.tar"


def run(run_dir: Path, task: str, shards: tuple[str, str], *overrides: str, ranks: int = 2) -> list[dict[str, float]]:
    """The lines of metrics.jsonl of a whole run, or of one that goes on."""
    config = composed([*CLIPS, *TASKS[task], *shards, f"run_dir={run_dir}", *overrides])
    codes = run_distributed(lambda _: guarded(lambda: train.train(config)), ranks, init=False)
    assert codes == [0] * ranks
    return read_metrics(run_dir)


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> Callable[[str], tuple[Path, list[dict[str, float]]]]:
    """whole(task): a run of four steps on two ranks under ZeRO-3, and its lines."""

    @functools.cache
    def made(task: str) -> tuple[Path, list[dict[str, float]]]:
        run_dir = tmp_path_factory.mktemp(task) / "whole"
        return run_dir, run(run_dir, task, shards)

    return made


def losses(lines: list[dict[str, float]]) -> list[tuple[float, float]]:
    return [(line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line]


def from_step_2(run_dir: Path, copy: Path) -> Path:
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000004")
    return copy


@pytest.mark.parametrize("task", TASKS)
def test_a_run_on_clips_goes_on_bit_for_bit_and_on_another_number_of_ranks(task, whole, shards, tmp_path):
    run_dir, lines = whole(task)
    assert len(losses(lines)) == 4 and all(norm > 0 for _, norm in losses(lines))
    assert len(list((run_dir / "pictures").glob(f"{task}_*.png"))) == 2
    again = run(from_step_2(run_dir, tmp_path / "again"), task, shards)
    assert losses(again) == losses(lines)
    first, second = (read_checkpoint_weights(find_checkpoint(each)) for each in (run_dir, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = run(from_step_2(run_dir, tmp_path / "alone"), task, shards, "engine=zero1", ranks=1)
    for ours, theirs in zip(losses(alone), losses(lines), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    scores = [name for name in lines[-1] if name.startswith("val/")]
    assert scores and {name: alone[-1][name] for name in scores} == pytest.approx(
        {name: lines[-1][name] for name in scores}, rel=1e-4
    )


def expected_probabilities(run_dir: Path, views: int, crops: int, shards: tuple[str, str]) -> np.ndarray:
    """(clips, classes) in float64: the mean over views, one at a time, whose pixels are cut out by plain slices."""
    config = composed([*CLIPS, *TASKS["classify"], *shards, f"run_dir={run_dir}"])
    task = build_task(config, torch.device("cpu"))
    task.module.load_state_dict(read_checkpoint_weights(find_checkpoint(run_dir)))
    module = task.module.double().eval()
    mean, std = (np.array(each)[:, None, None, None] for each in (config.data.mean, config.data.std))
    found = []
    for number in range(100, 100 + EVALUATED):
        film = np.stack([decode_image(jpeg(frame), "jpg").numpy() for frame in moving(number, LONG)], axis=1)
        total = np.zeros(2)
        for view in range(views):
            last = LONG - ((FRAMES - 1) * STRIDE + 1)
            start = round(last * view / (views - 1))
            for crop in range(crops):
                left = round((24 - SIDE) * crop / (crops - 1))
                pixels = film[:, start : start + FRAMES * STRIDE : STRIDE, :, left : left + SIDE] / 255
                with torch.no_grad():
                    logits = module(torch.from_numpy((pixels - mean) / std)[None])[0]
                total += logits.softmax(0).numpy()
        found.append(total / (views * crops))
    return np.stack(found)


def test_views_of_clips_are_averaged_as_plain_loops_average_them_on_any_number_of_ranks(whole, shards, tmp_path, capfd):
    run_dir, _ = whole("classify")
    probabilities = expected_probabilities(run_dir, 3, 2, shards)
    labels = [number % 2 for number in range(100, 100 + EVALUATED)]
    top1 = 100 * float(np.mean(probabilities.argmax(1) == labels))
    loss = float(np.mean([-np.log(row[label]) for row, label in zip(probabilities, labels, strict=True)]))
    seen = (f"run_dir={run_dir}", "task.eval_views=3", "task.eval_crops=2")
    found = [evaluated(capfd, *seen, f"out={tmp_path}/{ranks}", ranks=ranks) for ranks in (1, 2, 3)]
    for line in found:
        assert (line["images"], line["val/top1"], line["val/top5"]) == (EVALUATED, top1, 100.0)
        assert line["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert json.loads((tmp_path / "2" / "evaluation.json").read_text())["classes"] == ["right", "left"]
    assert (tmp_path / "3" / "picture.png").is_file()
    one = evaluated(capfd, f"run_dir={run_dir}")
    assert abs(one["val/loss"] - loss) > 1e-6, "one view of the middle is not the mean of six"


def test_classes_are_learned_from_an_encoder_that_simmim_trained_on_clips(whole, shards, tmp_path):
    """At a rate of 0 the encoder is that of the run before, bit for bit, time and all; what was loaded is said."""
    run_dir, _ = whole("simmim")
    still = ("train.max_steps=1", "optim.lr=0", "optim.schedule.warmup_lr=0", "optim.schedule.min_lr=0")
    probed = ("probe.methods=[knn]", "probe.knn_neighbours=3")
    lines = run(tmp_path / "run", "classify", shards, f"task.init_from={run_dir}", *still, *probed, ranks=1)
    assert 0 <= lines[-1]["probe/knn_top1"] <= 100
    ours, theirs = (read_checkpoint_weights(find_checkpoint(each)) for each in (tmp_path / "run", run_dir))
    shared = [name for name in ours if not name.startswith("head.")]
    assert len(shared) > 20 and all(torch.equal(ours[name], theirs[f"encoder.{name}"]) for name in shared)
    assert ours["patch_embed.proj.weight"].shape == (8, 3, 2, 4, 4)
    said = json.loads((tmp_path / "run" / "environment.json").read_text())
    report = json.dumps(said)
    assert "weights from" in report and "weights of images became" not in report
