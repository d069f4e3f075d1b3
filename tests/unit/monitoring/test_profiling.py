"""runtime.profile: a trace that a person can open, and a run that does not notice it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from swinv2_train import train
from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.monitoring.profiling import BACKWARD, CHECKPOINT, DATA, EVALUATION, FORWARD, OPTIMIZER
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.configs import composed
from tests.support.harness import run_distributed
from tests.support.small_run import SMALL


def train_on_two(run_dir: Path, shards: tuple[str, str], *more: str) -> list[float]:
    """The losses of 6 steps under ZeRO-3."""
    settings = [setting for setting in SMALL if not setting.startswith(("engine", "train.eval"))]
    config = composed([
        "experiment=cifar10_finetune", f"run_dir={run_dir}", *settings, *shards, "task.init_from=null",
        "task.num_classes=4", "engine=zero3", "train.max_steps=6", "train.checkpoint_every_steps=3",
        "train.eval_every_steps=2", "train.keep_checkpoints=3", *more,
    ])  # fmt: skip
    codes = run_distributed(lambda world: guarded(lambda: train.train(config)), 2, init=False)
    assert codes == [EXIT_DONE] * 2, codes
    return [line["train/loss"] for line in read_metrics(run_dir)]


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


@pytest.mark.slow
def test_a_traced_run_under_zero_3_has_the_same_losses_and_resumes(shards, tmp_path):
    """Every labelled part of a step is in each rank's trace, as often as it happened in the steps that were asked for;
    the steps after a resume are traced anew beside the first ones."""
    plain = train_on_two(tmp_path / "plain", shards)
    run_dir = tmp_path / "traced"
    keys = ("runtime.profile=true", "runtime.profile_steps=[2,3]", "runtime.profile_all_ranks=true")
    assert train_on_two(run_dir, shards, *keys) == plain
    (run_dir / "checkpoints" / "step_00000006" / "COMPLETE").unlink()
    assert train_on_two(run_dir, shards, *keys) == plain
    folder = run_dir / "profile"
    names = [
        f"rank_{rank:05d}_steps_{steps}" for rank in (0, 1) for steps in ("00000002-00000003", "00000005-00000006")
    ]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{n}{end}" for n in names for end in (".json.gz", ".txt")
    )
    for name in names:
        found = [event["name"] for event in events(folder / f"{name}.json.gz") if event.get("cat") == "user_annotation"]
        count = {part: found.count(part) for part in (FORWARD, BACKWARD, OPTIMIZER, EVALUATION)}
        assert count == {FORWARD: 2, BACKWARD: 2, OPTIMIZER: 2, EVALUATION: 1}, name
        assert DATA in found and CHECKPOINT in found
        assert "Self CPU" in (folder / f"{name}.txt").read_text()
    last = f"{names[0]}.json.gz"
    assert any("aten::_fused_adamw_" in event["name"] for event in events(folder / last))


@pytest.mark.parametrize("steps", ["[0,1]", "[3,2]", "[4]", "[1,21]"])
def test_steps_that_cannot_be_traced_are_refused(steps, tmp_path):
    with pytest.raises(ConfigError, match=r"runtime\.profile_steps \(.*\) must be \[first, last\]"):
        composed([f"run_dir={tmp_path}", "data.shards=x", f"runtime.profile_steps={steps}"])
