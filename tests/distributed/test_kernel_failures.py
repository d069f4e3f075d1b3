"""An attention kernel that fails on one of two ranks: at the start, and in the middle of a step, under every stage.

The kernel is the compiled one of CPUs; on rank 1 its C functions raise at some call.
"""

from __future__ import annotations

import json
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from swinv2_train import train
from swinv2_train.config import Config
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED
from swinv2_train.distributed import World
from swinv2_train.models.kernels import cpu_attention, trial
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.status import read_status, status_text
from swinv2_train.tasks.simmim import SimMIMTask
from tests.support.harness import run_distributed
from tests.support.kernel_faults import break_library
from tests.support.shard_files import noise_shards
from tests.support.small_run import run_alone, weights_of

pytestmark = pytest.mark.skipif(cpu_attention.problem() is not None, reason="there is no compiled kernel here")
ENGINES = {
    "zero 0": ("engine=zero1", "engine.zero_stage=0", "engine.precision=fp32"),
    "zero 1, bf16": ("engine=zero1", "engine.precision=bf16"),
    "zero 2": ("engine=zero1", "engine.zero_stage=2", "engine.precision=fp32"),
    "zero 3, bf16": ("engine=zero3", "engine.precision=bf16"),
}
OWN = (
    "model.depths=[2,1]", "model.drop_path_rate=0.3", "optim.schedule.warmup_epochs=0", "optim.schedule.name=constant",
    "train.micro_batch_size=2", "train.checkpoint_every_steps=2", "data.num_workers=0",
)  # fmt: skip
BLOCKS, MICRO_BATCHES, TRIED = 3, 2, 3
"""Calls of the kernel in a forward pass, forward passes of a step, calls in the trial at the start."""
CAUSE = "RuntimeError: no such instruction"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[str, str]:
    """16 training images and 6 of evaluation, of 4 classes."""
    return noise_shards(tmp_path_factory.mktemp("shards"))


def run(config: Config, cache: Path, which: str | None = None, first: int = 0) -> list[int]:
    """Train on two ranks; on rank 1 the kernel's pass `which` fails after first good calls."""

    def command(world: World) -> Any:
        os.environ["TRITON_CACHE_DIR"] = str(cache / str(world.rank))  # nothing was tried before,
        trial.forget()  # not in the process that this one was forked from either: TRIED calls are the trial's
        if which is not None and world.rank == 1:
            break_library(types.SimpleNamespace(setattr=setattr), which, window=(2, 2), first=first)
        return train.train(config)

    return run_distributed(command, 2, init=False)


def paths_of(run_dir: Path) -> set[str]:
    """How the stages attend by environment.json, which status.json must repeat."""
    paths = json.loads((run_dir / "environment.json").read_text())[-1]["start"]["attention_paths"]
    assert list(paths) == ["stage 1", "stage 2"] and read_status(run_dir)["attention"] == paths
    assert all(path.split(" (")[0] in (run_dir / "report.html").read_text() for path in paths.values())
    return set(paths.values())


@pytest.mark.parametrize(
    ("engine", "which", "into_step"),
    [
        ("zero 0", "forward", 4),
        ("zero 1, bf16", "backward", 1),
        ("zero 2", "backward", 5),
        ("zero 3, bf16", "backward", 4),
    ],
)
def test_a_step_in_which_a_kernel_fails_is_taken_again_by_the_reference(
    engine, which, into_step, settings, tmp_path, capfd
):
    """Bit for bit the step of a run that goes on from the step before with the reference: the same images, the same
    random numbers, no half of a gradient; and the ranks agree."""
    own = (*OWN, *ENGINES[engine])
    failing = settings(*own, "train.max_steps=4", f"run_dir={tmp_path / 'failing'}", task="simmim")
    before = TRIED + 2 * BLOCKS * MICRO_BATCHES
    assert run(failing, tmp_path / "cache_a", which, before + into_step) == [EXIT_DONE] * 2
    said = capfd.readouterr().out
    for steps, attention in ((2, "fused"), (4, "reference")):
        until = (f"train.max_steps={steps}", f"model.attention={attention}", f"run_dir={tmp_path / 'plain'}")
        plain = settings(*own, *until, task="simmim")
        assert run(plain, tmp_path / "cache_b") == [EXIT_DONE] * 2
    losses = [
        [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path / name) if "train/loss" in line]
        for name in ("failing", "plain")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    weights = [weights_of(config) for config in (failing, plain)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    warnings = [line for line in said.splitlines() if line.startswith("warning: model.attention (fused) is not used")]
    assert warnings and all("rank 1: " in line and CAUSE in line for line in warnings), said
    assert all(line.endswith("the step is taken again") for line in warnings)
    assert all(path.startswith("reference: rank 1: ") for path in paths_of(tmp_path / "failing"))
    assert "attention: " in status_text(read_status(tmp_path / "failing"))
    assert all("train/skipped_steps" not in line for line in read_metrics(tmp_path / "failing"))


def test_a_kernel_that_fails_on_one_rank_at_the_start_serves_on_none(settings, tmp_path, capfd):
    own = (*OWN, *ENGINES["zero 3, bf16"], "train.max_steps=2")
    losses = {}
    for name, which, attention in (("failing", "backward", "fused"), ("plain", None, "reference")):
        config = settings(*own, f"model.attention={attention}", f"run_dir={tmp_path / name}", task="simmim")
        assert run(config, tmp_path / f"cache_{name}", which) == [EXIT_DONE] * 2
        losses[name] = [line.get("train/loss") for line in read_metrics(tmp_path / name)]
    assert losses["failing"] == losses["plain"]
    said = capfd.readouterr().out
    (line,) = [line for line in said.splitlines() if "model.attention (fused) is not used" in line][:1]
    assert line.startswith("warning: ") and "rank 1: the kernels failed (windows of 2x2" in line and CAUSE in line
    assert all(path.startswith("reference: rank 1: ") for path in paths_of(tmp_path / "failing"))
    assert paths_of(tmp_path / "plain") == {"reference: model.attention=reference"}


def test_a_device_that_is_lost_ends_the_run_with_the_remedy(settings, tmp_path, capfd):
    """A CUDA error that stays is met behind the kernel, at whatever waits for the device: nothing is taken again."""
    config = settings("train.max_steps=2", f"run_dir={tmp_path / 'run'}", task="simmim")

    def break_device() -> None:  # in the fork alone
        def lost(*arguments: Any) -> Any:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        SimMIMTask.loss = lost  # type: ignore[method-assign]

    assert run_alone(config, break_device) == EXIT_FAILED
    reason = read_status(tmp_path / "run")["reason"]
    assert "an illegal memory access was encountered: this process has lost its device" in reason
    assert "with model.attention=reference" in reason
    assert "model.attention=reference" in capfd.readouterr().err
