"""How long the demo trains on this machine: a few real steps of each phase are timed, and epochs chosen that fit."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from swinv2_train.config.arguments import last_of_each
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.storage.atomic import replace_text

STEPS, FIRST = 8, 3
"""Timed are the last of so many steps, from this one on."""
OF_A_STEP = 1 / 3
"""What a batch of an evaluation takes of a training step: a forward pass of forward and backward (which is two)."""
LENGTH_FILE = "length.json"


SHORT = ("data.crop_scale=[0.85,1.0]", "optim.lr=3.0e-3")
"""Of a fine-tuning that sees every image a few times: less augmentation, larger steps (docs/LOG.md)."""


@dataclass(frozen=True)
class Length:
    """Epochs of both phases, and the test accuracy in per cent that they gave when they were tried (docs/LOG.md)."""

    pretrain: float
    finetune: float
    top1: float | None
    overrides: tuple[str, ...] = SHORT
    """Of the fine-tuning."""

    def text(self) -> str:
        gave = "not tried" if self.top1 is None else f"top-1 {self.top1:.1f} % when it was tried, in bf16"
        return f"epochs of pre-training {self.pretrain:g}, of fine-tuning {self.finetune:g} ({gave})"


LENGTHS = (
    Length(3, 6, 66.8, overrides=()), Length(1, 4, 63.2), Length(1, 3, 59.4), Length(1, 2, 54.2), Length(1, 1, 47.4),
)  # fmt: skip
"""From the best on.  There is no longer one, however fast the machine."""


@dataclass(frozen=True)
class Timed:
    """What a phase takes on this machine, in seconds."""

    step: float
    around: float
    """Start and end."""


@dataclass(frozen=True)
class Work:
    """Steps of an epoch, and what the fine-tuning evaluates."""

    epoch_steps: float
    eval_batches: float
    """Of the size of a training step's."""
    eval_every_steps: int


def seconds(length: Length, pretrain: Timed, finetune: Timed, work: Work) -> float:
    """What the whole would take from now on: both phases, their evaluations, and the one at the end."""
    steps = length.finetune * work.epoch_steps
    evaluations = steps // work.eval_every_steps + 2  # the last of the run, and the evaluate command
    training = length.pretrain * work.epoch_steps * pretrain.step + steps * finetune.step
    scoring = evaluations * work.eval_batches * OF_A_STEP * finetune.step
    return training + scoring + pretrain.around + 2 * finetune.around


def choose(left_sec: float, pretrain: Timed, finetune: Timed, work: Work) -> Length:
    """The best length that ends within so many seconds, or the shortest."""
    fitting = (length for length in LENGTHS if seconds(length, pretrain, finetune, work) <= left_sec)
    return next(fitting, LENGTHS[-1])


def measure(command: Sequence[str], run_dir: Path, ranks: Callable[[list[str]], int]) -> tuple[int, Timed | None]:
    """A few steps of a phase, as it will run, in a run directory that is removed again.

    Returns the ranks' exit code, and what was timed where it is 0.
    """
    shutil.rmtree(run_dir, ignore_errors=True)
    own = (f"run_dir={run_dir}", "train.epochs=null", f"train.max_steps={STEPS}", "train.log_every_steps=1")
    command = last_of_each([*command, *own])
    started = time.monotonic()
    code = ranks(["-m", "swinv2_train.train", *command])
    taken = time.monotonic() - started
    if code != EXIT_DONE:
        return code, None
    steps = [line["perf/step_sec"] for line in read_metrics(run_dir) if line.get("perf/step_sec") is not None]
    shutil.rmtree(run_dir)
    step = median(steps[FIRST:])
    return code, Timed(step, max(taken - STEPS * step, 0.0))


def kept(runs: Path) -> Length | None:
    """What was chosen for these runs when they were begun; None where nothing was."""
    try:
        found = json.loads((runs / LENGTH_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return None
    overrides = tuple(found.get("overrides", ()))  # demos that were begun before 2026-12 had neither
    return Length(found["pretrain"], found["finetune"], found.get("top1"), overrides)


def keep(runs: Path, length: Length) -> None:
    """Write down what was chosen."""
    runs.mkdir(parents=True, exist_ok=True)
    replace_text(runs / LENGTH_FILE, json.dumps(asdict(length)) + "\n")
