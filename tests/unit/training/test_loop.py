"""What happens at which step: learning rates, log lines, evaluations, pictures, checkpoints, stops.  No real engine."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.data.sample import SampleError
from swinv2_train.distributed import World
from swinv2_train.engine import NonFiniteError
from swinv2_train.models import SwinTransformerV2
from swinv2_train.monitoring.activity import RankActivity
from swinv2_train.runtime import StopRequest
from swinv2_train.training import loop, saver
from swinv2_train.training.attention_paths import AttentionPaths
from swinv2_train.training.lr_schedule import RunLength
from swinv2_train.training.monitor import Monitor
from swinv2_train.training.position import Position
from swinv2_train.training.saver import Saver
from tests.support.harness import run_distributed
from tests.support.one_rank import ONE
from tests.support.toy import toy_config


def batch_of(loss: float, key: str, num_bad: int = 0) -> dict[str, Any]:
    problems = [{"shard": "s", "key": key, "cause": "torn"}] * num_bad
    return {
        "loss": torch.tensor(loss),
        "keys": [key],
        "num_bad": num_bad,
        "problems": problems,
        "weight": torch.ones(4),
    }


class Loader(list):
    """Batches, and whether it was closed."""

    closed = False

    def state_dict(self, images_seen: int, bad_images: int) -> dict[str, Any]:
        return {"position": images_seen, "bad_images": bad_images}

    def check_bad_images(self, bad_images: int, images_seen: int) -> None:
        if bad_images > 3:
            raise SampleError(f"{bad_images} of {images_seen} images are damaged")

    def close(self) -> None:
        self.closed = True


class Task:
    """The loss and the score of a batch stand in it; a picture remembers the batch that it shows."""

    multiply_adds = 1

    def __init__(self) -> None:
        self.pictures: list[str] = []

    def loss(self, forward: Any, batch: dict[str, Any]) -> torch.Tensor:
        return batch["loss"]

    def count(self, batch: dict[str, Any]) -> float:
        return batch["count"]

    def scores(self, forward: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"val/loss": batch["loss"]}

    def picture(self, forward: Any, batch: dict[str, Any], names: Any) -> np.ndarray:
        self.pictures.append(batch["keys"][0])
        return np.zeros((2, 2, 3), np.uint8)


class Engine:
    """Remembers the learning rates; step n may be told to fail or to ask for a stop, in two places."""

    evaluate = forward = None

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.before_step: Any = lambda number: None
        self.before_backward: Any = lambda number: None

    def backward(self, loss: torch.Tensor) -> None:
        self.before_backward(len(self.rates) + 1)
        self.losses.append(float(loss))

    def step(self, lr: float) -> float:
        self.before_step(len(self.rates) + 1)
        self.rates.append(lr)
        return 0.5


class Log:
    """Lines and pictures as the run wrote them."""

    def __init__(self) -> None:
        self.lines: dict[int, dict[str, Any]] = {}
        self.pictures: list[int] = []

    def metrics(self, step: int, images_seen: int, values: dict[str, Any]) -> None:
        self.lines.setdefault(step, {"images_seen": images_seen}).update(values)

    def picture(self, name: str, step: int, array: np.ndarray) -> None:
        self.pictures.append(step)

    def progress(self, *numbers: Any) -> None: ...

    def progress_within(self, *numbers: float) -> None: ...

    def say(self, text: str) -> None: ...

    def steps_with(self, name: str) -> list[int]:
        return [step for step, values in self.lines.items() if name in values]


@pytest.fixture
def saved(monkeypatch) -> list[tuple[int, dict[str, Any], Any]]:
    """(step, state, best) of every checkpoint."""
    found: list[tuple[int, dict[str, Any], Any]] = []

    class Save:
        under_way = False
        warnings = ()

        def __init__(self, run_dir, engine, state, world, keep, best, background):
            self.step = state["step"]
            found.append((self.step, state, best))

        def finish(self) -> None: ...

    monkeypatch.setattr(saver, "Save", Save)
    return found


def make_run(
    total: int, accumulation: int = 1, evaluation: bool = True, step: int = 0, world: World = ONE, **train: Any
) -> loop.Run:
    config = toy_config(micro=4)  # global_batch_size 16
    config.model.attention = "reference"
    settings = {"log_every_steps": 100, "checkpoint_every_steps": 100, "picture_every_steps": 100}
    for key, value in (settings | train).items():
        setattr(config.train, key, value)
    losses = Loader(batch_of(float(i + 1), f"train{i}", i % 2) for i in range(accumulation * (total - step)))
    position = Position(step, 16 * step, losses, world.device, 16, 16)
    log, activity, engine, task = Log(), RankActivity(), Engine(), Task()
    encoder = SwinTransformerV2(32, 4, embed_dim=8, depths=(1,) * 4, num_heads=(1,) * 4, window_size=4)
    attention = AttentionPaths(config, world, encoder, log.say, lambda _: None)
    return loop.Run(
        config=config, world=world, task=task, attention=attention, engine=engine, position=position,
        saver=Saver(config, world, engine, position, log, activity, step or None),
        monitor=Monitor(config, world, position, total, task.multiply_adds, log, activity),
        eval_loader=Loader([batch_of(3.0, "eval0"), batch_of(5.0, "eval1")]) if evaluation else None, probe=None,
        accumulation_steps=accumulation, length=RunLength(total, total, 0, None),
    )  # fmt: skip


def test_each_step_is_taken_and_logged_with_the_rate_of_the_steps_before_it(saved):
    """Step 0 has warmup_lr, the first step after the warm-up the peak: lr_at of the completed steps."""
    run = replace(make_run(6, log_every_steps=1), length=RunLength(6, 6, 2, None))
    run.config.optim.lr = 1.0
    run.config.optim.schedule.name, run.config.optim.schedule.warmup_lr = "linear", 0.2
    assert loop.fit(run, StopRequest())
    assert run.engine.rates == pytest.approx([0.2, 0.6, 1.0, 0.75, 0.5, 0.25])
    assert [run.monitor.log.lines[step]["train/lr"] for step in range(1, 7)] == run.engine.rates
    again = replace(make_run(6, step=4), length=RunLength(6, 6, 2, None))
    again.config.optim = run.config.optim
    loop.fit(again, StopRequest())
    assert again.engine.rates == pytest.approx([0.5, 0.25])


def test_what_happens_every_so_many_steps_also_happens_at_the_last(saved):
    """A run's last state is logged, evaluated, drawn and saved, whatever the periods are."""
    run = make_run(7, log_every_steps=3, eval_every_steps=2, picture_every_steps=5, checkpoint_every_steps=3)
    assert loop.fit(run, StopRequest())
    assert run.monitor.log.steps_with("train/loss") == [1, 3, 6, 7]
    assert run.monitor.log.steps_with("val/loss") == [2, 4, 6, 7]
    assert run.monitor.log.pictures == [5, 7]
    assert [step for step, _, _ in saved] == [3, 6, 7] == run.monitor.log.steps_with("checkpoint/stall_sec")
    assert run.saver.saved_step == 7 and run.position.loader.closed and run.eval_loader.closed


def test_null_evaluates_at_the_end_only_and_without_shards_never(saved):
    run = make_run(4, eval_every_steps=None)
    loop.fit(run, StopRequest())
    assert run.monitor.log.steps_with("val/loss") == [4]
    run = make_run(4, evaluation=False, eval_every_steps=1)
    loop.fit(run, StopRequest())
    assert run.monitor.log.steps_with("val/loss") == []


def test_keep_best_saves_at_every_evaluation_with_its_score(saved):
    """The best is a checkpoint only when each measured state is saved; other checkpoints carry no score."""
    run = make_run(5, eval_every_steps=2, checkpoint_every_steps=3, keep_best="val/loss")
    loop.fit(run, StopRequest())
    score = ("val/loss", 4.0)
    assert [(step, best) for step, _, best in saved] == [(2, score), (3, None), (4, score), (5, score)]
    saved.clear()
    loop.fit(make_run(4, eval_every_steps=2), StopRequest())
    assert [(step, best) for step, _, best in saved] == [(4, None)]


def test_images_and_position_count_on_from_where_the_run_resumed(saved):
    """images_seen is of all starts together; the checkpoint's data position is the same number."""
    run = make_run(5, step=3, log_every_steps=1)
    loop.fit(run, StopRequest())
    assert run.position.images_seen == 80 and [run.monitor.log.lines[step]["images_seen"] for step in (4, 5)] == [
        64,
        80,
    ]
    assert [(state["images_seen"], state["data"]) for _, state, _ in saved] == [(80, {"position": 80, "bad_images": 1})]


def test_logged_loss_is_the_mean_over_the_steps_micro_batches_and_skipped_images_add_up(saved):
    """Micro-batches of losses 1 and 2, then 3 and 4; one damaged sample in each step, counted since the start."""
    run = make_run(3, accumulation=2, log_every_steps=1)
    loop.fit(run, StopRequest())
    assert [run.monitor.log.lines[step]["train/loss"] for step in (1, 2, 3)] == [1.5, 3.5, 5.5]
    assert [run.monitor.log.lines[step]["data/skipped_images"] for step in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize(("loss_mean", "engine", "logged"), [("local", [2, 4], 3), ("global", [1, 6], 3.5)])
def test_loss_of_a_step_is_the_mean_of_micro_batches_or_of_what_they_count(loss_mean, engine, logged, saved):
    """Losses 2 and 4 of 3 and 9 images: the engine, which takes the mean over micro-batches, gets them weighted."""
    run = make_run(1, accumulation=2, loss_mean=loss_mean, evaluation=False)
    run.position.loader = Loader([batch_of(2.0, "a") | {"count": 3.0}, batch_of(4.0, "b") | {"count": 9.0}])
    loop.fit(run, StopRequest())
    assert run.engine.losses == engine and run.monitor.log.lines[1]["train/loss"] == logged


def test_global_loss_where_nothing_counts_is_zero(saved):
    """Only stand-ins of damaged samples: losses of 0, and no division by their number."""
    run = make_run(1, accumulation=2, loss_mean="global", evaluation=False)
    run.position.loader = Loader([batch_of(0.0, name) | {"count": 0.0} for name in "ab"])
    loop.fit(run, StopRequest())
    assert run.engine.losses == [0, 0] and run.monitor.log.lines[1]["train/loss"] == 0


def test_pictures_show_the_first_images_of_the_evaluation_or_else_of_the_step(saved):
    """The same images each time, so that pictures compare."""
    run = make_run(3, picture_every_steps=1)
    loop.fit(run, StopRequest())
    assert run.task.pictures == ["eval0"] * 3
    run = make_run(3, picture_every_steps=1, evaluation=False)
    loop.fit(run, StopRequest())
    assert run.task.pictures == ["train0", "train1", "train2"]


def test_evaluation_batches_count_by_their_images():
    """The last batch may hold one image or none; a mean over batches would count it like a full one."""
    full, one, none = batch_of(1.0, "a"), batch_of(9.0, "b"), batch_of(float("nan"), "")
    one["weight"], none["weight"] = torch.tensor([1.0, 0, 0, 0]), torch.zeros(4)
    assert loop.evaluate_loader(partial(Task().scores, None), [full, one, none]) == {"val/loss": (4 * 1 + 9) / 5}


def stop_at(stop: StopRequest, number: int, step: int) -> None:
    """A real SIGTERM from within a step."""
    if number == step:
        stop.install()
        signal.raise_signal(signal.SIGTERM)
        stop.uninstall()


@pytest.mark.parametrize("checkpoint_every_steps", [100, 2])
def test_a_stop_ends_after_the_step_with_one_checkpoint_of_it(checkpoint_every_steps, saved):
    """The step that the signal met is finished; a checkpoint that was just written is not written again."""
    stop = StopRequest()
    run = make_run(9, checkpoint_every_steps=checkpoint_every_steps)
    run.engine.before_backward = lambda number: stop_at(stop, number, 2)
    assert loop.fit(run, stop) is False
    assert [step for step, _, _ in saved] == [2] and run.position.step == 2 and run.position.images_seen == 32
    assert run.position.loader.closed and run.eval_loader.closed


def test_a_stop_during_the_optimizers_step_ends_after_the_next_one(saved):
    """By then the ranks have agreed on that: asking again would be a wait for the device."""
    stop = StopRequest()
    run = make_run(9)
    run.engine.before_step = lambda number: stop_at(stop, number, 2)
    assert loop.fit(run, stop) is False and [step for step, _, _ in saved] == [3] and run.position.step == 3


def test_a_stop_before_the_first_step_of_a_resumed_run_saves_nothing(saved):
    assert loop.fit(make_run(9, step=4), StopRequest(after_sec=0)) is False and saved == []


def test_a_time_limit_stops_like_a_signal(saved):
    """Half a second of steps of a tenth: saved, and no step is begun after the limit."""
    run, stop = make_run(100), StopRequest(after_sec=0.5)
    run.engine.before_step = lambda number: time.sleep(0.1)
    assert loop.fit(run, stop) is False and stop.requested == "the time limit"
    assert 1 <= run.position.step <= 6 and [step for step, _, _ in saved] == [run.position.step]


def test_ranks_stop_at_the_same_step_when_the_signal_reaches_one():
    """Else one rank waits in a collective that the other never enters."""

    def stopped_at(world: World) -> tuple[int, list[int]]:
        steps: list[int] = []
        Saver.save = lambda saver, score: steps.append(run.position.step)  # a fork's own
        stop = StopRequest()
        run = make_run(9, world=world)
        if world.rank == 1:
            run.engine.before_backward = lambda number: stop_at(stop, number, 3)
        loop.fit(run, stop)
        return run.position.step, steps

    assert run_distributed(stopped_at, 2) == [(3, [3]), (3, [3])]


def test_a_stop_within_a_step_drops_its_work_and_saves_the_step_before(saved):
    """A step of hours is not waited for.  The random states are those of before it, or the step would be another one
    when it is taken again."""
    stop, run, states = StopRequest(), make_run(9, accumulation=4), []
    run.position.loader = Loader(batch_of(1.0, f"train{i}") for i in range(36))

    def draw(number: int) -> None:
        states.append((torch.rand(()), np.random.rand()))
        stop_at(stop, len(run.engine.losses), 9)

    run.engine.before_backward = draw
    run.engine.before_step = lambda number: states.append((torch.get_rng_state(), np.random.get_state()[1:3]))
    assert loop.fit(run, stop) is False
    assert run.position.step == 2 and run.position.images_seen == 32 and [step for step, _, _ in saved] == [2]
    assert len(run.engine.losses) == 10 and run.position.loader.closed
    (torch_state, (words, place)) = states[-3]  # after step 2, before two micro-batches
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], words) and np.random.get_state()[2] == place


def test_ranks_stop_before_the_same_micro_batch_when_the_signal_reaches_one():
    """Also between micro-batches, where they do not wait for each other."""

    def stopped_at(world: World) -> tuple[int, list[int], int]:
        steps: list[int] = []
        Saver.save = lambda saver, score: steps.append(run.position.step)  # a fork's own
        stop, run = StopRequest(), make_run(9, accumulation=8, world=world)
        run.position.loader = Loader(batch_of(1.0, f"train{i}") for i in range(72))
        if world.rank == 1:
            run.engine.before_backward = lambda number: stop_at(stop, len(run.engine.losses), 19)
        loop.fit(run, stop)
        return run.position.step, steps, len(run.engine.losses)

    (one, other) = run_distributed(stopped_at, 2)
    assert one == other and one[:2] in ((2, [2]), (3, [3])) and 20 <= one[2] <= 24


def test_a_wait_for_data_ends_at_once(saved):
    """A download that hangs is not waited for: what was trained is saved."""
    stop, run = StopRequest(), make_run(9)
    batches = list(run.position.loader)

    class Slow(Loader):
        def __iter__(self) -> Any:
            yield from batches[:2]
            threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            time.sleep(600)

    run.position.loader = Slow()
    started = time.monotonic()
    with stop:
        assert loop.fit(run, stop) is False
    assert time.monotonic() - started < 300 and [step for step, _, _ in saved] == [2]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # a stopped process ignores what comes after
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


class Scoring(Loader):
    """Asks for a stop while its second batch is scored."""

    def __init__(self, stop: StopRequest) -> None:
        super().__init__([batch_of(3.0, "eval0"), batch_of(5.0, "eval1"), batch_of(7.0, "eval2")])
        self.stop, self.given = stop, 0

    def __iter__(self) -> Any:
        for number in range(3):
            self.given += 1
            stop_at(self.stop, number, 1)
            yield self[number]


@pytest.mark.parametrize(("total", "every"), [(6, 2), (2, None)])
def test_an_evaluation_that_a_stop_cuts_short_is_made_up_for(total, every, saved, tmp_path):
    """Its step is saved; the scores are taken when the run goes on, also where nothing but them is left."""
    stop = StopRequest()
    run = make_run(total, eval_every_steps=every)
    run = replace(run, eval_loader=Scoring(stop))
    assert loop.fit(run, stop) is False
    assert [step for step, _, _ in saved] == [2] and run.eval_loader.given < 4
    assert run.monitor.log.lines[2] == {"images_seen": 32, "val/unfinished": 1, **run.monitor.log.lines[2]}
    assert run.monitor.log.steps_with("val/loss") == []
    again = make_run(total, eval_every_steps=every, step=2)
    again.config.run_dir = str(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "images_seen": 32, "val/unfinished": 1}\n')
    assert loop.fit(again, StopRequest())
    assert again.monitor.log.lines[2]["val/loss"] == 4.0 and again.monitor.log.lines[2]["val/unfinished"] == 0
    assert again.monitor.log.steps_with("val/loss") == ([2, 4, 6] if every else [2])


def test_a_step_that_is_not_finite_is_named_and_leaves_no_trace(saved):
    """No checkpoint, no line and no count of a step that was not taken."""

    def fail(number: int) -> None:
        if number == 3:
            raise NonFiniteError("the global gradient norm is nan")

    run = make_run(5, log_every_steps=1, checkpoint_every_steps=2)
    run.engine.before_step = fail
    with pytest.raises(loop.BadStepError, match=r"step 3 was not taken: .*is nan; .* checkpoint is of step 2"):
        loop.fit(run, StopRequest())
    assert (
        run.position.step,
        run.position.images_seen,
        max(run.monitor.log.lines),
        [step for step, _, _ in saved],
    ) == (2, 32, 2, [2])


def test_more_damaged_images_than_the_data_allow_end_the_run_when_they_are_counted(saved):
    """Over all ranks, at log lines and checkpoints; the count goes on from the starts before."""
    run = make_run(9, log_every_steps=1, evaluation=False)
    run.position.bad_images = 2
    with pytest.raises(SampleError, match="4 of 64 images are damaged"):
        loop.fit(run, StopRequest())
    assert run.monitor.log.lines[3]["data/skipped_images"] == 3


def test_damaged_samples_are_listed_with_their_step(saved, tmp_path):
    """Whoever repairs the shards finds each one by name; a line of a step that is run again is not there twice."""
    for step in (0, 2):
        run = make_run(4, step=step, evaluation=False)
        run.config.run_dir, run.config.data.on_bad_sample = str(tmp_path), "replace"
        loop.fit(run, StopRequest())
    lines = (tmp_path / "bad_samples" / "rank_00000.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": step, "shard": "s", "key": "train1", "cause": "torn"} for step in (2, 4)
    ]


@pytest.mark.parametrize(("bad", "taken"), [({3}, True), ({3, 4}, True), ({3, 4, 5}, False), ({3, 5, 7}, True)])
def test_skipped_steps_count_their_images_and_too_many_in_a_row_end_the_run(bad, taken, saved):
    """The run is as long as planned, and the learning rate goes on."""

    def fail(number: int) -> None:
        calls.append(number)
        if len(calls) in bad:
            raise NonFiniteError("the global gradient norm is inf")

    calls: list[int] = []
    run = make_run(8, evaluation=False, on_bad_step="skip", max_bad_steps=2)
    run.position.loader = Loader(batch_of(1.0, f"train{i}") for i in range(8))
    run.engine.before_step = fail
    if not taken:
        with pytest.raises(loop.BadStepError, match="step 5 was not taken"):
            loop.fit(run, StopRequest())
        return
    assert loop.fit(run, StopRequest())
    assert (run.position.step, run.position.images_seen, len(run.engine.rates)) == (8, 128, 8 - len(bad))
    assert run.monitor.log.steps_with("train/skipped_steps") == sorted(bad)


def test_going_back_without_a_checkpoint_ends_the_run(saved):
    def fail(number: int) -> None:
        raise NonFiniteError("the global gradient norm is nan")

    run = make_run(3, on_bad_step="rollback")
    run.engine.before_step = fail
    with pytest.raises(loop.BadStepError, match="step 1 was not taken: .* there is no checkpoint"):
        loop.fit(run, StopRequest())


@pytest.mark.parametrize("where", ["train_loader", "eval_loader"])
def test_damage_in_the_data_ends_the_run_with_its_own_message(where, saved):
    """A ConfigError, which the command answers with one line and exit code 2."""

    def damaged():
        yield batch_of(1.0, "a")
        raise SampleError("image_7 is damaged")

    class Damaged(Loader):
        __iter__ = lambda self: damaged()  # noqa: E731

    run = make_run(3)
    if where == "eval_loader":
        run = replace(run, eval_loader=Damaged())
    else:
        run.position.loader = Damaged()
    with pytest.raises(ConfigError, match="image_7 is damaged"):
        loop.fit(run, StopRequest())
    assert saved == []


def test_recorded_keys_hold_every_step_once_after_a_resume(tmp_path: Path, saved):
    """Lines of steps that are run again and a line that a kill has torn are dropped."""
    path = tmp_path / "sample_keys" / "rank_00000.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"step": step, "keys": ["old"]}) + "\n" for step in (1, 2, 3)) + '{"step": 4')
    run = make_run(4, accumulation=2, step=2)
    run.config.run_dir, run.config.data.record_keys = str(tmp_path), True
    loop.fit(run, StopRequest())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["keys"]) for line in lines] == [
        (1, ["old"]), (2, ["old"]), (3, ["train0", "train1"]), (4, ["train2", "train3"]),
    ]  # fmt: skip
