"""A loss that is not finite, or jumps, on one rank: all ranks stop, skip or go back alike, under every engine."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Container
from typing import Any

import pytest
import torch

from swinv2_train import train
from swinv2_train.checkpoint import read_checkpoint_weights
from swinv2_train.config import Config
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED
from swinv2_train.distributed import World
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.tasks.simmim import SimMIMTask
from tests.support.harness import run_distributed
from tests.support.shard_files import noise_shards
from tests.support.small_run import weights_of

ENGINES = {
    "local": ("engine=local",),
    "zero 0": ("engine=zero1", "engine.zero_stage=0", "engine.precision=fp32"),
    "zero 1, bf16": ("engine=zero1", "engine.precision=bf16"),
    "zero 2": ("engine=zero1", "engine.zero_stage=2", "engine.precision=fp32"),
    "zero 3, bf16": ("engine=zero3", "engine.precision=bf16"),
}
STEPS = (
    "train.max_steps=8",
    "train.checkpoint_every_steps=2",
    "model.drop_path_rate=0.3",
    "optim.schedule.warmup_epochs=0",
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[str, str]:
    """16 training images and 6 of evaluation, of 4 classes."""
    return noise_shards(tmp_path_factory.mktemp("shards"))


def run_with_fault(config: Config, ranks: int, factor: float, faults: Container[int]) -> list[int]:
    """Train, with the last rank's loss multiplied by factor in these of its forward passes; the exit codes.

    Passes are counted over everything that is run, steps that are taken again included.
    """

    def command(world: World) -> Any:
        true_loss, passes = SimMIMTask.loss, itertools.count(1)

        def loss(self: SimMIMTask, forward: Any, batch: dict[str, Any]) -> torch.Tensor:
            value = true_loss(self, forward, batch)
            return value * factor if next(passes) in faults and world.rank == ranks - 1 else value

        SimMIMTask.loss = loss  # type: ignore[method-assign]  a fork's own
        return train.train(config)

    return run_distributed(command, ranks, init=False)


@pytest.mark.parametrize("engine", ENGINES)
def test_going_back_once_gives_the_run_that_had_no_fault(engine, settings, tmp_path, capfd):
    """A fault of the hardware costs the steps since the last checkpoint and leaves no trace, bit for bit."""
    ranks = 1 if engine == "local" else 2
    one_pass = "train.micro_batch_size=8" if ranks == 1 else "train.micro_batch_size=4"  # a forward pass a step
    runs = []
    for name, factor in (("clean", 1.0), ("fault", math.nan)):
        own = ("train.on_bad_step=rollback", "train.background_save=true", f"run_dir={tmp_path / name}", one_pass)
        runs.append(settings(*STEPS, *ENGINES[engine], *own, task="simmim"))
        assert run_with_fault(runs[-1], ranks, factor, {6}) == [EXIT_DONE] * ranks
    clean, fault = (weights_of(config) for config in runs)
    assert all(torch.equal(clean[name], fault[name]) for name in clean)
    lines = [read_metrics(tmp_path / name) for name in ("clean", "fault")]
    losses = [[(line["step"], line.get("train/loss")) for line in each] for each in lines]
    assert losses[0] == losses[1]
    said = capfd.readouterr().out
    assert said.count("step 6 was not taken") == said.count("back at ") == 1, said


@pytest.mark.parametrize("engine", ENGINES)
def test_a_skipped_step_moves_nothing_and_the_next_ones_go_on(engine, settings, tmp_path):
    """A fault in the middle and one in the last step: both leave the weights of the step before, and between them
    training goes on.
    """
    ranks = 1 if engine == "local" else 2
    one_pass = "train.micro_batch_size=8" if ranks == 1 else "train.micro_batch_size=4"
    own = ("train.on_bad_step=skip", "optim.schedule.name=constant", "train.keep_checkpoints=8", one_pass)
    config = settings(*STEPS, *ENGINES[engine], *own, "train.checkpoint_every_steps=1", task="simmim")
    assert run_with_fault(config, ranks, math.inf, {6, 8}) == [EXIT_DONE] * ranks
    run_dir = tmp_path / "run"
    assert [line["step"] for line in read_metrics(run_dir) if line.get("train/skipped_steps")] == [6, 8]
    weights = [read_checkpoint_weights(run_dir / "checkpoints" / f"step_{step:08d}") for step in range(1, 9)]
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(weights)]
    assert moved == [step not in (6, 8) for step in range(2, 9)]
    assert all(torch.isfinite(tensor).all() for tensor in weights[-1].values())


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_fault_that_stays_ends_the_run_on_every_rank(policy, settings, tmp_path, capfd):
    """Whatever the policy is, the last good checkpoint is there and the ranks that failed are named."""
    config = settings(
        *STEPS, *ENGINES["zero 3, bf16"], f"train.on_bad_step={policy}", "train.max_bad_steps=1",
        "train.micro_batch_size=4", f"run_dir={tmp_path / 'run'}", task="simmim",
    )  # fmt: skip
    assert run_with_fault(config, 2, math.nan, range(5, 1000)) == [EXIT_FAILED] * 2
    assert max(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")) == "step_00000004"
    said = "".join(capfd.readouterr())
    for rank in (0, 1):
        assert re.search(
            rf"rank {rank} failed: BadStepError: step [56] was not taken: .* finite on ranks \[1\]", said
        ), said


def test_a_loss_that_jumps_is_a_bad_step_only_where_it_is_asked_for(settings, tmp_path):
    """A hundredfold loss on one rank after enough others to compare with; finite, so that nothing else would notice."""
    for factor, skipped in (("null", []), ("5", [25])):
        run_dir = tmp_path / f"run{factor}"
        config = settings(
            *STEPS[1:], *ENGINES["zero 2"], "train.max_steps=27", "train.on_bad_step=skip", "optim.lr=1e-5",
            "train.micro_batch_size=4", f"train.loss_spike_factor={factor}", f"run_dir={run_dir}", task="simmim",
        )  # fmt: skip
        assert run_with_fault(config, 2, 100.0, {25}) == [EXIT_DONE] * 2
        assert [line["step"] for line in read_metrics(run_dir) if line.get("train/skipped_steps")] == skipped
