"""A run from its start to its exit code: what is seeded, restored, refused, written and closed.  One process, local."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from swinv2_train import evaluate, train
from swinv2_train.checkpoint import newest_checkpoint
from swinv2_train.config import ConfigError, MachineError, OutageError
from swinv2_train.config.command_line import load_run_config
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER_ERROR
from swinv2_train.config.load import config_yaml
from swinv2_train.data.shards.tar_reader import open_manifest
from swinv2_train.distributed import World
from swinv2_train.engine.local import LocalEngine
from swinv2_train.monitoring.activity import DATA_WAIT, TRAINING, RankActivity
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.tasks import build_task
from swinv2_train.training import build as building
from swinv2_train.training import loop
from swinv2_train.training.initial_weights import initial_weights
from swinv2_train.weights import save_weights
from tests.support.commands import keys_per_step
from tests.support.harness import run_distributed
from tests.support.one_rank import ONE
from tests.support.small_run import run_alone, weights_of

CPU = torch.device("cpu")


@pytest.mark.slow
def test_seed_decides_the_initial_weights(settings, tmp_path):
    """A step of rate 0 leaves them as drawn: the same for the same seed, others for another."""
    still = ("train.max_steps=1", "optim.lr=0", "optim.schedule.warmup_lr=0", "optim.schedule.min_lr=0")
    found = []
    for number, seed in enumerate((1, 1, 2)):
        config = settings(*still, f"seed={seed}", f"run_dir={tmp_path / str(number)}")
        assert run_alone(config) == EXIT_DONE
        found.append(weights_of(config))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["head.weight"], found[2]["head.weight"])


@pytest.mark.slow
def test_a_run_that_is_stopped_within_a_step_goes_on_bit_for_bit(settings, tmp_path, capfd):
    """The step's first micro-batch has drawn which paths to drop; it draws them again."""
    few = ("train.max_steps=4", "model.drop_path_rate=0.5", "train.micro_batch_size=2")

    def stop_within_step_3():
        backward, calls = LocalEngine.backward, []

        def counting(engine, loss):
            backward(engine, loss)
            calls.append(1)
            if len(calls) == 10:  # of four a step
                os.kill(os.getpid(), signal.SIGTERM)

        LocalEngine.backward = counting
        return lambda: len(calls)

    assert run_alone(settings(*few, f"run_dir={tmp_path / 'whole'}")) == EXIT_DONE
    config = settings(*few)
    capfd.readouterr()
    assert run_alone(config, stop_within_step_3) == (EXIT_STOPPED, 10)
    said = capfd.readouterr().out
    assert "SIGTERM: stopping" in said  # what, is said by a thread that hears it a moment later
    assert "stopped by SIGTERM after step 2" in said
    assert newest_checkpoint(tmp_path / "run").name == "step_00000002"
    assert run_alone(config) == EXIT_DONE
    whole, resumed = (read_metrics(tmp_path / name) for name in ("whole", "run"))
    assert [line["train/loss"] for line in resumed] == [line["train/loss"] for line in whole]
    assert [line["train/grad_norm"] for line in resumed] == [line["train/grad_norm"] for line in whole]


@pytest.mark.parametrize(
    ("doing", "micro_batches", "said"),
    [
        (TRAINING, 1, "SIGTERM: stopping after this step"),
        (TRAINING, 4, "SIGTERM: stopping after this micro-batch; the step's work so far is dropped"),
        (DATA_WAIT, 4, "SIGTERM: stopping the wait for data"),
        ("evaluation", 4, "SIGTERM: stopping after this: evaluation"),
    ],
)
def test_a_stop_says_what_it_ends(doing, micro_batches, said):
    lines: list[str] = []
    activity = RankActivity()
    with activity.doing(doing):
        train.acknowledge(SimpleNamespace(say=lines.append), activity, micro_batches, "SIGTERM", False)
        train.acknowledge(SimpleNamespace(say=lines.append), activity, micro_batches, "SIGTERM", True)
    assert lines == [said, said.replace("SIGTERM", "SIGTERM again")]


@pytest.mark.slow
def test_resumed_run_writes_each_step_once_and_is_the_same_run(settings, tmp_path):
    """Steps after the newest checkpoint run again; metrics.jsonl drops their old lines.  A finished run says so."""
    config = settings("train.max_steps=5", "train.checkpoint_every_steps=2", "train.keep_checkpoints=3")
    assert run_alone(config) == EXIT_DONE
    run_dir = tmp_path / "run"
    before = read_metrics(run_dir)
    assert [line["images_seen"] for line in before] == [8, 16, 24, 32, 40]
    (run_dir / "checkpoints" / "step_00000005" / "COMPLETE").unlink()
    (run_dir / "checkpoints" / "step_00000004" / "COMPLETE").unlink()
    assert run_alone(config) == EXIT_DONE
    raw = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in raw if "train/loss" in line] == [1, 2, 3, 4, 5]
    for old, new in zip(before, read_metrics(run_dir), strict=True):
        assert (old["train/loss"], old["images_seen"], old["train/lr"]) == (
            new["train/loss"], new["images_seen"], new["train/lr"],
        )  # fmt: skip
    (run_dir / "report.html").unlink()
    assert run_alone(config) == EXIT_DONE
    assert (run_dir / "report.html").exists(), "a report that a kill prevented is written by the next call"


def rewind(run_dir: Path, step: int) -> None:
    """As if the run had been killed after the checkpoint of this step."""
    for path in (run_dir / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            (path / "COMPLETE").unlink()


@pytest.mark.slow
def test_a_run_of_an_older_version_resumes(settings, tmp_path, capfd):
    """Its files lack what was added since: sizes of batches, names of classes, keys, what a start says of itself."""
    assert run_alone(settings("train.max_steps=2")) == EXIT_DONE
    run_dir = tmp_path / "run"
    checkpoint = newest_checkpoint(run_dir)
    state = json.loads((checkpoint / "state.json").read_text())
    old = json.dumps({name: state[name] for name in ("step", "images_seen", "data")})
    (checkpoint / "state.json").write_text(old)
    marker = json.loads((checkpoint / "COMPLETE").read_text())
    assert set(marker["files"]["state.json"]) >= {"bytes", "crc32"}
    marker["files"]["state.json"] |= {"bytes": len(old), "crc32": f"{zlib.crc32(old.encode()):08x}"}
    (checkpoint / "COMPLETE").write_text(json.dumps(marker))
    config = (run_dir / "config.yaml").read_text()
    assert "  verify: false\n" in config
    (run_dir / "config.yaml").write_text(config.replace("  verify: false\n", ""))
    (run_dir / "classes.json").unlink(missing_ok=True)
    starts = json.loads((run_dir / "environment.json").read_text())
    del starts[0]["start"]
    (run_dir / "environment.json").write_text(json.dumps(starts))
    assert run_alone(settings("train.max_steps=4")) == EXIT_DONE, capfd.readouterr().err
    assert [line["step"] for line in read_metrics(run_dir)] == [1, 2, 3, 4]
    state = json.loads((newest_checkpoint(run_dir) / "state.json").read_text())
    assert state["images_seen"] == 32 and state["first_batch_size"] == state["batch_size"] == 8
    assert load_run_config(run_dir).data.verify is False


@pytest.mark.parametrize("batch", [16, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_whose_batch_changes_has_its_epochs_and_its_rates_by_images(batch, settings, tmp_path, capfd):
    """5 epochs of 16 images: 80 are seen, each image once in every epoch, and the rate is the undisturbed run's there.

    Counted in steps, a batch of 16 at step 6 "was done" with 48 images, and one of 4 went on for 104.
    """
    more = ("train.max_steps=null", "train.epochs=5", "optim.schedule.warmup_epochs=1", "data.record_keys=true")
    config = settings(*more, "train.checkpoint_every_steps=6", "train.keep_checkpoints=9")
    run_dir = tmp_path / "run"
    assert run_alone(config) == EXIT_DONE
    quiet = {line["images_seen"] - 8: line["train/lr"] for line in read_metrics(run_dir)}  # images before the step
    rewind(run_dir, 6)
    capfd.readouterr()
    assert run_alone(settings(*more, f"train.global_batch_size={batch}", "train.checkpoint_every_steps=1")) == EXIT_DONE
    said = capfd.readouterr().out
    assert f"train.global_batch_size is {batch} and was 8 until step 6 (48 images)" in said
    lines = read_metrics(run_dir)
    assert [line["images_seen"] for line in lines] == [*range(8, 49, 8), *range(48 + batch, 81, batch)]
    for before, line in zip([0, *(line["images_seen"] for line in lines)], lines, strict=False):
        assert before not in quiet or line["train/lr"] == quiet[before], before
    rates = [line["train/lr"] for line in lines[2:]]
    assert rates == sorted(rates, reverse=True)
    keys = [key for step, used in sorted(keys_per_step(run_dir).items()) for key in used]
    for epoch in range(5):
        assert len(set(keys[16 * epoch : 16 * epoch + 16])) == 16, epoch
    rewind(run_dir, 6)  # and back again, from a checkpoint of before
    assert run_alone(settings(*more)) == EXIT_DONE
    assert {line["images_seen"] - 8: line["train/lr"] for line in read_metrics(run_dir)} == quiet
    capfd.readouterr()
    assert run_alone(settings(*more, "train.global_batch_size=16")) == EXIT_DONE
    assert "all 10 steps are done" in capfd.readouterr().out


@pytest.mark.slow
def test_a_length_in_steps_stays_one_when_the_batch_changes(settings, tmp_path, capfd):
    """train.max_steps is a number of optimizer steps: the run ends there, with the same rates, and says the images."""
    more = ("train.max_steps=6", "train.epochs=null", "optim.schedule.warmup_epochs=1")
    assert run_alone(settings(*more, "train.checkpoint_every_steps=3", "train.keep_checkpoints=9")) == EXIT_DONE
    run_dir = tmp_path / "run"
    quiet = [line["train/lr"] for line in read_metrics(run_dir)]
    rewind(run_dir, 3)
    assert run_alone(settings(*more, "train.global_batch_size=16")) == EXIT_DONE
    said = capfd.readouterr().out
    assert "train.max_steps (6) and the learning rate count steps, so the run ends at 72 images" in said
    assert [line["images_seen"] for line in read_metrics(run_dir)] == [8, 16, 24, 40, 56, 72]
    assert [line["train/lr"] for line in read_metrics(run_dir)] == quiet
    assert run_alone(settings("train.max_steps=4")) == EXIT_DONE
    assert "its 6 steps (72 images) are past train.max_steps (4)" in capfd.readouterr().out


def test_a_start_that_waited_for_another_goes_on_from_what_that_one_left(settings, tmp_path, capfd, monkeypatch):
    """Two starts at one moment in a directory that is not there yet: the second trained over the finished first.

    It had looked for checkpoints before the first made the directory, and did not look again when it had the lock.
    """
    config = settings("train.max_steps=3")
    assert run_alone(config) == EXIT_DONE
    (tmp_path / "run").rename(tmp_path / "aside")

    def other_first(run_dir: Path) -> None:  # the moment between the look and the lock
        (tmp_path / "aside").rename(run_dir)

    monkeypatch.setattr(train, "make_run_dir", other_first)  # ranks are forks
    assert run_alone(config) == EXIT_DONE
    assert "all 3 steps are done" in capfd.readouterr().out
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert len(starts) == 1 and len(read_metrics(tmp_path / "run")) == 3


def test_best_checkpoint_by_the_configured_score_stays(settings, tmp_path):
    """train.keep_best from the command line to the folder: the lowest loss is not among the newest."""
    config = settings(
        "train.max_steps=4", "train.eval_every_steps=1", "train.keep_best=val/loss", "train.keep_checkpoints=1"
    )

    def scores_rise() -> None:
        values = iter([0.3, 0.1, 0.2, 0.4])
        loop.evaluate_loader = lambda *arguments: {"val/loss": next(values)}

    assert run_alone(config, scores_rise) == EXIT_DONE
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000004"]


@pytest.mark.parametrize(
    ("outcome", "code", "closed_with", "report"),
    [
        (True, EXIT_DONE, 0, True),
        (False, EXIT_STOPPED, 0, True),
        (RuntimeError("a bug"), EXIT_FAILED, 1, True),
        (ConfigError("the user's"), EXIT_USER_ERROR, 2, False),
        (OutageError("the server's"), EXIT_FAILED, 1, True),
        (MachineError("this rank's"), EXIT_FAILED, 1, True),
    ],
)
def test_however_a_run_ends_its_log_is_closed_and_its_exit_code_says_how(
    outcome, code, closed_with, report, settings, tmp_path
):
    """wandb loses what it holds when nobody closes it; a stop is no failure; wrong input leaves no report."""

    def around() -> Any:
        closed: list[int] = []
        close = train.RunLog.close

        def recorded(self: Any, exit_code: int = 0) -> None:
            closed.append(exit_code)
            close(self, exit_code)

        def fit(run: loop.Run, stop: Any) -> bool:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        train.RunLog.close, loop.fit = recorded, fit
        return lambda: closed

    assert run_alone(settings("train.max_steps=2"), around) == (code, [closed_with])
    assert (tmp_path / "run" / "report.html").exists() is report
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["outage"] is isinstance(outcome, MachineError)  # train.sbatch starts it again


def test_refused_start_leaves_no_configuration_behind(settings, tmp_path):
    """Labels beyond the classes, and an init_from that is nothing: before anything of the run is written."""
    for overrides in (("task.num_classes=3",), (f"task.init_from={tmp_path}",), ("model.num_heads=[5,5]",)):
        assert run_alone(settings("train.max_steps=1", *overrides)) == EXIT_USER_ERROR
        assert not (tmp_path / "run").exists(), overrides


@pytest.mark.slow
def test_init_from_counts_at_the_start_and_not_at_a_resume(settings, tmp_path):
    """A resumed fine-tuning goes on with its own weights; its source may be gone by then."""
    source = settings("train.max_steps=1", f"run_dir={tmp_path / 'source'}", task="simmim")
    assert run_alone(source) == EXIT_DONE
    still = ("optim.lr=0", "optim.schedule.warmup_lr=0", "optim.schedule.min_lr=0", "train.max_steps=1")
    config = settings(*still, f"task.init_from={tmp_path / 'source'}")
    assert run_alone(config) == EXIT_DONE
    theirs, ours = weights_of(source), weights_of(config)
    for name, tensor in ours.items():
        if not name.startswith("head."):
            assert torch.equal(tensor, theirs[f"encoder.{name}"]), name
    (tmp_path / "source").rename(tmp_path / "gone")
    config.train.max_steps = 2
    assert run_alone(config) == EXIT_DONE
    assert newest_checkpoint(tmp_path / "run").name == "step_00000002"


@pytest.mark.slow
def test_any_tasks_run_may_start_from_other_peoples_weights(settings, tmp_path):
    """A supervised file of timm's into pre-training and fine-tuning; the head follows task.init_head."""
    from tests.support.weights_samples import classifier

    model = classifier(img_size=16, num_classes=6, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2,
                       pretrained_window_sizes=(0, 0))  # fmt: skip
    save_weights(model, tmp_path / "timm.pth", "timm")
    (tmp_path / "classes.txt").write_text("5\n0\n3\n1\n")
    still = ("optim.lr=0", "optim.schedule.warmup_lr=0", "optim.schedule.min_lr=0", "train.max_steps=1")
    start = (*still, f"task.init_from={tmp_path / 'timm.pth'}")
    with pytest.raises(ConfigError, match=r"task.init_from: .*head.bias is \(6,\), the model has \(4,\); head=fresh"):
        initial_weights(settings(*start), build_task(settings(), CPU), ONE)
    for task, head in (("finetune", f"task.init_head={tmp_path / 'classes.txt'}"), ("simmim", "task.init_head=auto")):
        config = settings(*start, head, f"run_dir={tmp_path / task}", task=task)
        assert run_alone(config) == EXIT_DONE
        prefix = "encoder." if task == "simmim" else ""
        trained = weights_of(config)
        for name, tensor in model.state_dict().items():
            if not name.startswith("head."):
                assert torch.equal(trained[prefix + name], tensor), name
        if task == "finetune":
            assert torch.equal(trained["head.weight"], model.head.weight[[5, 0, 3, 1]])


@pytest.mark.slow
def test_a_position_bias_of_other_windows_is_warned_about_with_the_remedy(settings, tmp_path):
    """Fine-tuning at another window without pretrained_window_sizes would change what the bias means, unseen."""
    source = settings("train.max_steps=1", f"run_dir={tmp_path / 'source'}", task="simmim")
    assert run_alone(source) == EXIT_DONE
    model = build_task(settings(), CPU).module
    save_weights(model, tmp_path / "hf", "huggingface")
    save_weights(model, tmp_path / "bare.pth", "microsoft")
    larger = ("model.img_size=32", "model.window_size=4")
    right = "model.pretrained_window_sizes=[2,2]"
    cases = [(name, (*larger, *more), not more) for name in ("source", "hf") for more in ((), (right,))]
    for name, overrides, warned in [*cases, ("bare.pth", larger, False)]:
        config = settings(*overrides, f"task.init_from={tmp_path / name}")
        initial = initial_weights(config, build_task(config, CPU), ONE)
        assert (f"{right} keeps its meaning" in initial.report) is warned, (name, overrides)


# --------------------------------------------------------------------------------------------------------------------
# Parts of the start


class SilentLog:
    def __init__(self) -> None:
        self.resumed: list[int] = []

    def resume_at(self, step: int) -> None:
        self.resumed.append(step)

    def say(self, text: str) -> None: ...


@pytest.fixture
def build(settings, shards, monkeypatch):
    """build(world, newest, state): build_run around an engine that is none; the run and the log."""

    def build_run(world: World, newest: Path | None = None, state: dict[str, Any] | None = None) -> Any:
        config = settings("train.epochs=3", "optim.schedule.warmup_epochs=1.5", "train.global_batch_size=16")
        monkeypatch.setattr(
            building, "build_engine", lambda *arguments: SimpleNamespace(settings=arguments, initialise=print)
        )
        monkeypatch.setattr(building, "load_checkpoint", lambda *arguments: state)
        for note in ("ema_note", "device_note"):
            monkeypatch.setattr(building, note, lambda *_: None)  # there is no checkpoint on disk
        task = build_task(config, torch.device("cpu"))
        sources = building.Sources(*(open_manifest(pattern.partition("=")[2], "data.shards") for pattern in shards))
        log = SilentLog()
        return building.build_run(config, world, task, [], sources, log, newest, None), log

    return build_run


def test_lengths_of_a_run_come_from_its_epochs(build):
    """16 images in batches of 16: 3 steps, 2 of them (1.5 rounded up) warm-up; 2 ranks of 4 accumulate twice."""
    run, log = build(World(1, 1, 2, 2, torch.device("cpu")))
    assert (run.length.last_step, run.length.warmup_steps, run.accumulation_steps) == (3, 2, 2)
    assert (run.position.step, run.position.images_seen, run.saver.saved_step, log.resumed) == (0, 0, None, [0])
    assert run.engine.settings[4] == 2


def test_a_resumed_run_stands_where_its_checkpoint_says(build):
    """Steps, images, data position and the newest save; lines after it leave the log."""
    world = ONE
    fresh, _ = build(world)
    state = {"step": 2, "images_seen": 32, "data": fresh.position.loader.state_dict(32, 0)}
    run, log = build(world, Path("step_00000002"), state)
    assert (run.position.step, run.position.images_seen, run.saver.saved_step, log.resumed) == (2, 32, 2, [2])
    first = next(iter(run.position.loader))["keys"]
    skipped = [key for batch, _ in zip(fresh.position.loader, range(12), strict=False) for key in batch["keys"]]
    assert first == skipped[32:36]
    with pytest.raises(ConfigError, match="differs from the checkpoint's"):
        build(world, Path("step_00000002"), state | {"data": state["data"] | {"seed": 77}})


def test_ranks_draw_different_random_numbers_once_the_model_stands(build):
    """The same drop path on every rank would make two ranks half as random as one."""
    drawn = []
    for rank in (0, 1):
        build(World(rank, rank, 2, 2, torch.device("cpu")))
        drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1]


IDENTITY = {
    "task.num_classes": 5, "task.target": "multilabel", "optim.freeze": ["head"], "model.name": "tiny",
    "model.img_size": 64, "model.patch_size": 2, "model.window_size": 8,
    "model.pretrained_window_sizes": [4, 4], "model.embed_dim": 16, "model.depths": [2, 1], "model.num_heads": [2, 2],
    "model.mlp_ratio": 2.0, "model.drop_path_rate": 0.3, "model.extra_norm_period": 1, "model.in_chans": 4,
    "model.clamp_to_shorter_side": True, "model.frames": 4, "model.patch_frames": 2, "model.window_frames": 4,
    "model.pretrained_window_frames": 4,
}  # fmt: skip


@pytest.mark.parametrize("key", IDENTITY)
def test_a_run_directory_of_another_model_is_refused_by_the_key(key, settings, tmp_path, monkeypatch):
    """Weights that load into another model, or not at all, are never a resume."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    config = settings()
    (tmp_path / "run" / "config.yaml").write_text(config_yaml(config))
    monkeypatch.setattr(building, "newest_checkpoint", lambda run_dir: checkpoint)
    assert building.checked_newest(tmp_path / "run", config) == checkpoint
    section, name = key.split(".")
    setattr(getattr(config, section), name, IDENTITY[key])
    with pytest.raises(ConfigError, match=f"holds a run with {key}=.*, but this command has {key}="):
        building.checked_newest(tmp_path / "run", config)
    rest = {f.name for f in dataclasses.fields(config.model)} - set(building.MEMORY_KEYS)
    assert {f"model.{name}" for name in rest} <= IDENTITY.keys()


def test_a_resume_may_change_memory_policy_length_and_rate(settings, tmp_path, monkeypatch):
    """What does not make the weights another model's; and the other task is refused."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(config_yaml(settings()))
    monkeypatch.setattr(building, "newest_checkpoint", lambda run_dir: checkpoint)
    other = settings(
        "model.recompute=blocks", "model.attention=reference", "model.compile=blocks", "model.sequential_stages=[1]",
        "model.attention_chunk_windows=2", "model.attention_chunk_mib=9",
        "train.max_steps=99", "optim.lr=0.5", "task.label_smoothing=0",
    )  # fmt: skip
    assert building.checked_newest(tmp_path / "run", other) == checkpoint
    with pytest.raises(ConfigError, match="holds a run with task.name=classify, but this command has task.name=simmim"):
        building.checked_newest(tmp_path / "run", settings(task="simmim"))


@pytest.mark.parametrize(
    ("error", "kinds"),
    [
        (None, ["answer", "answer"]),
        (ConfigError("wrong"), ["ConfigError: wrong", "ConfigError: wrong"]),
        (OSError("disk full"), ["ConfigError: disk full", "ConfigError: disk full"]),
        (MachineError("no memory is left"), ["OutageError: no memory is left", "OutageError: no memory is left"]),
        (ZeroDivisionError("bug"), ["ZeroDivisionError: bug", "RuntimeError: rank 0 failed:"]),
    ],
)
def test_what_the_first_rank_finds_or_raises_reaches_every_rank(error, kinds):
    """A rank that goes on alone waits for ever; what cannot be read or written is the user's to fix."""

    def ask(world: World) -> str:
        def answer() -> str:
            assert world.is_main
            if error is not None:
                raise error
            return "answer"

        try:
            return train.on_main(world, answer)
        except Exception as caught:  # noqa: BLE001  its kind is the result
            return f"{type(caught).__name__}: {caught}".splitlines()[0]

    assert run_distributed(ask, 2) == kinds


# --------------------------------------------------------------------------------------------------------------------
# The evaluate command


@pytest.mark.slow
def test_evaluate_command_scores_the_named_checkpoint_in_evaluation_mode(settings, tmp_path, capfd):
    """checkpoint= chooses one, else it is the newest; stochastic depth is off, so the scores repeat."""
    config = settings("train.max_steps=2", "train.checkpoint_every_steps=1", "optim.lr=0.5", "model.drop_path_rate=0.9")
    assert run_alone(config) == EXIT_DONE
    first = tmp_path / "run" / "checkpoints" / "step_00000001"

    def score(*arguments: str) -> dict[str, Any]:
        def command(world: World) -> None:
            sys.argv = ["evaluate", f"run_dir={tmp_path / 'run'}", *arguments]
            with pytest.raises(SystemExit) as left:
                evaluate.main()
            assert left.value.code == EXIT_DONE

        capfd.readouterr()
        run_distributed(command, 1, init=False)
        return json.loads(capfd.readouterr().out)

    newest, again, older = score(), score(), score(f"checkpoint={first}")
    assert newest == again and newest["images"] == 6
    assert newest["checkpoint"].endswith("step_00000002") and older["checkpoint"] == str(first)
    assert newest["val/loss"] != older["val/loss"]
    logged = read_metrics(tmp_path / "run")[-1]
    for name in ("val/loss", "val/top1", "val/top5"):
        assert newest[name] == pytest.approx(logged[name], rel=1e-4), name
