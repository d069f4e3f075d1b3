"""The train and evaluate commands as a user starts them: torchrun, two ranks, ZeRO-3, real shards, real signals."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from swinv2_train.checkpoint import find_checkpoint, newest_checkpoint, read_checkpoint_weights
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.commands import SMALL, finish, finish_ranks, keys_per_step, losses, ranks_of, start, wait_for_step
from tests.support.images import encoded

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory) -> Path:
    """A SimMIM run of 12 steps that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, output = finish(
        start("experiment=cifar10_simmim", f"run_dir={run_dir}", "train.max_steps=12", "data.record_keys=true",
              "train.picture_every_steps=6", "model.drop_path_rate=0.2", *SMALL, *shards)
    )  # fmt: skip
    assert code == 0, output
    return run_dir


def test_a_run_leaves_what_the_contract_promises(uninterrupted):
    """RUN_DIR of DESIGN section 3."""
    assert (uninterrupted / "config.yaml").exists() and (uninterrupted / "report.html").exists()
    starts = json.loads((uninterrupted / "environment.json").read_text())
    assert starts[0]["world_size"] == 2
    lines = read_metrics(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line["images_seen"] == 16 * line["step"] for line in lines)
    assert {"train/loss", "train/lr", "train/grad_norm", "mem/peak_gib", "data/wait_sec"} <= lines[-1].keys()
    assert "val/loss" in lines[-1] and lines[-1]["perf/images_per_sec"] > 0
    assert [p.name for p in sorted((uninterrupted / "pictures").glob("simmim_*.png"))] == [
        "simmim_00000006.png",
        "simmim_00000012.png",
    ]
    assert [p.name for p in sorted((uninterrupted / "checkpoints").iterdir())] == ["step_00000008", "step_00000012"]
    assert not (uninterrupted / "wandb").exists()
    log = (uninterrupted / "logs" / "rank_00001.log").read_text()
    assert "is deprecated" not in log  # 1 kB a step


def test_every_sample_is_used_once_per_epoch(uninterrupted):
    """60 samples, 12 steps of 16: positions run on over the border of the epochs."""
    keys = keys_per_step(uninterrupted)
    flat = [key for step in sorted(keys) for key in keys[step]]
    assert len(flat) == 192 and all(len(keys[step]) == 16 for step in keys)
    counts = {key: flat.count(key) for key in flat}
    assert len(counts) == 60 and set(counts.values()) == {3, 4}


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_an_interrupted_run_goes_on_bit_for_bit(how, uninterrupted, shards, tmp_path):
    """Killed without a word, or stopped by Ctrl-C: the same command gives the same losses, norms and images."""
    run_dir = tmp_path / "run"
    command = (
        "experiment=cifar10_simmim", f"run_dir={run_dir}", "train.max_steps=12", "data.record_keys=true",
        "train.picture_every_steps=6", "model.drop_path_rate=0.2", *SMALL, *shards,
    )  # fmt: skip
    process = start(*command, interpreter=how == "SIGTERM")
    wait_for_step(run_dir, 6, process)
    if how == "SIGKILL":
        for pid in [*ranks_of(process), process.pid]:
            os.kill(pid, signal.SIGKILL)
        finish(process)
        assert newest_checkpoint(run_dir) == run_dir / "checkpoints" / "step_00000004"
    else:
        process.send_signal(getattr(signal, how))  # torchrun passes it on to the ranks
        _, output = finish(process)
        newest = newest_checkpoint(run_dir)
        assert newest is not None and int(newest.name[5:]) >= 6, output
        assert f"stopped by {how} after step" in output
    code, output = finish_ranks(*command)
    assert code == 0, output
    assert "resuming from" in output
    assert losses(run_dir) == losses(uninterrupted)
    assert keys_per_step(run_dir) == keys_per_step(uninterrupted)
    assert len(json.loads((run_dir / "environment.json").read_text())) == 2

    code, output = finish_ranks(*command)
    assert code == 0 and "all 12 steps are done" in output


def test_finetuning_starts_from_the_pretrained_encoder_and_is_evaluated(uninterrupted, shards, tmp_path):
    """Pre-train, fine-tune, evaluate: the encoder's weights arrive, and the command's scores are those of the run."""
    run_dir = tmp_path / "run"
    code, output = finish_ranks(
        "experiment=cifar10_finetune", f"run_dir={run_dir}", f"task.init_from={uninterrupted}", "optim.lr=0",
        "train.max_steps=1", "optim.schedule.warmup_lr=0", *SMALL, *shards, "engine.precision=bf16",
    )  # fmt: skip
    assert code == 0, output
    assert f"weights from {uninterrupted}/checkpoints/step_00000012: 60 weights loaded" in output
    pretrained, finetuned = (read_checkpoint_weights(find_checkpoint(run)) for run in (uninterrupted, run_dir))
    assert set(finetuned) - {"head.weight", "head.bias"} == {
        name.removeprefix("encoder.") for name in pretrained if name.startswith("encoder.") and "mask_token" not in name
    }
    for name, tensor in finetuned.items():
        if not name.startswith("head."):
            assert (tensor == pretrained[f"encoder.{name}"]).all(), name  # unrounded, and a step of lr 0 moved nothing

    code, output = finish(start(f"run_dir={run_dir}", ranks=1, module="swinv2_train.evaluate"))
    assert code == 0, output
    scores = json.loads(output.splitlines()[-1])  # after what it says on stderr
    assert scores["images"] == 10 and scores["checkpoint"].endswith("step_00000001")
    assert scores["val/loss"] == pytest.approx(read_metrics(run_dir)[-1]["val/loss"], rel=0.02)  # bf16 against fp32


def test_wrong_use_of_a_run_directory_exits_with_2_and_one_message(uninterrupted, shards, tmp_path):
    """Another model in the same run_dir, and data that is not there: found before any training."""
    other = ("experiment=cifar10_simmim", f"run_dir={uninterrupted}", "model.depths=[1,1]", "engine=zero1")
    code, output = finish(start(*SMALL, *shards, *other, ranks=1, interpreter=True))
    assert code == 2, output
    assert (
        output.startswith("error: run_dir")
        and "model.depths=[1, 2], but this command has model.depths=[1, 1]" in output
    )
    assert len(output.splitlines()) == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    code, output = finish(
        start("experiment=cifar10_simmim", f"run_dir={tmp_path / 'run'}", f"data.shards={empty}/*.tar", ranks=1)
    )
    assert code == 2 and output.startswith("error: data.shards") and len(output.splitlines()) == 1, output
    assert not (tmp_path / "run").exists()
    code, output = finish(
        start("experiment=cifar10_finetune", f"run_dir={tmp_path / 'run'}", *shards, "task.num_classes=4", ranks=1)
    )
    assert code == 2 and "task.num_classes (4) is too small" in output, output


def said(output: str) -> list[str]:
    """The lines of the ranks that tell an error; torchrun's own report, which comes last, repeats one."""
    return [line for line in output.splitlines() if line.startswith("error: ")]


def test_sizes_that_do_not_fit_exit_with_2_before_training(shards, tmp_path):
    """Model and batch sizes that do not divide; under torchrun rank 0 alone says it."""
    run = ("experiment=cifar10_simmim", f"run_dir={tmp_path / 'run'}", *shards)
    code, output = finish(start(*run, "model.num_heads=[5,5]", ranks=1))
    assert code == 2 and "num_heads[0] (5) does not divide the stage's 96 channels" in output, output
    code, output = finish(start(*run, "train.global_batch_size=100", "train.micro_batch_size=32"))
    message = (
        "train.global_batch_size (100) is not a multiple of micro_batch_size (32) x world_size (2); nearest: 64, 128"
    )
    assert code != 0 and said(output) == [f"error: {message}"], output


def test_sigusr1_saves_and_exits_with_3(shards, tmp_path):
    """What a scheduler sends before it preempts; one process, where the exit code is the command's own."""
    run_dir = tmp_path / "run"
    command = ("experiment=cifar10_simmim", f"run_dir={run_dir}", "train.max_steps=500", *SMALL, *shards)
    process = start(*command, "train.checkpoint_every_steps=1000", ranks=1)
    wait_for_step(run_dir, 2, process)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)  # a second one must not tear the checkpoint
    code, output = finish(process)
    assert code == 3, output
    newest = newest_checkpoint(run_dir)
    assert newest is not None and read_metrics(run_dir)[-1]["step"] == int(newest.name[5:])
    assert read_metrics(run_dir)[-1]["checkpoint/stall_sec"] > 0
    config = (run_dir / "config.yaml").read_text()

    code, output = finish(start(*command, "seed=5", ranks=1))  # would change the order of images in mid-epoch
    assert code == 2 and "seed (5) differs from the checkpoint's (0)" in output, output
    assert (run_dir / "config.yaml").read_text() == config, "a refused command must not leave its configuration"

    (newest / "state.json").write_text("torn")
    code, output = finish(start(*command, ranks=1))
    assert code == 2 and "no checkpoint of" in output and "is whole" in output, output
    assert read_metrics(run_dir), "the history of a run is never thrown away"


@pytest.mark.parametrize("where", ["training", "picture"])
def test_a_damaged_sample_on_one_rank_is_named_once_and_ends_all(where, shards, tmp_path):
    """Rank 1 meets it, rank 0 says it: no rank waits for the other, and no message is lost."""
    rng = np.random.default_rng(0)
    damaged = 7 if where == "training" else 17

    def samples():
        for i in range(32):
            yield (
                f"image_{i:04d}",
                encoded(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8))[: 40 if i == damaged else None],
                "png",
                0,
            )

    broken = f"{tmp_path}/broken-*.tar"
    write_shards(samples(), str(tmp_path / "broken"), 32)
    if where == "training":
        images = (f"data.shards={broken}", "data.eval_shards=null")
    else:  # each rank has 16, and the picture shows the first 4
        images = (shards[0], f"data.eval_shards={broken}", "train.picture_every_steps=2")
    code, output = finish(
        start("experiment=cifar10_simmim", f"run_dir={tmp_path / 'run'}", "train.max_steps=4", *SMALL, *images)
    )
    assert code != 0
    key = f"image_{damaged:04d}"
    (error,) = said(output)
    assert key in error and "data.on_bad_sample=replace" in error, output
    assert "failed: " not in output.split("torch.distributed")[0], output


@pytest.mark.parametrize("what", ["nowhere", "other model"])
def test_init_from_that_does_not_fit_is_refused(what, uninterrupted, shards, tmp_path):
    source, message = (tmp_path, "task.init_from: .* is a directory without weights") if what == "nowhere" else (
        uninterrupted, r"task.init_from: .* The file has depths \(1, 2\); the model has depths \(1, 1\)")  # fmt: skip
    code, output = finish(
        start("experiment=cifar10_finetune", f"run_dir={tmp_path / 'run'}", f"task.init_from={source}", *SMALL, *shards,
              "model.depths=[1,1]", ranks=1)
    )  # fmt: skip
    assert code == 2 and re.search(message, output), output
    assert len([line for line in output.splitlines() if not line.startswith("note: data.")]) <= 2, output
