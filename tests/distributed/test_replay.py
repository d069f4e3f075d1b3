"""A step that is not finite is kept, with the state before it, and swinv2-replay repeats it and names the layer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from swinv2_train import replay, train
from swinv2_train.checkpoint import read_checkpoint_weights
from swinv2_train.config import Config
from swinv2_train.config.exit_codes import EXIT_FAILED
from swinv2_train.distributed import World
from swinv2_train.tasks.simmim import SimMIMTask
from tests.support.harness import run_distributed
from tests.support.shard_files import noise_shards

ENGINES = {"zero 1": "engine=zero1", "zero 3": "engine=zero3"}
OWN = (
    "engine.precision=bf16", "train.micro_batch_size=4", "train.max_steps=4", "train.checkpoint_every_steps=1",
    "model.drop_path_rate=0.3", "optim.schedule.warmup_epochs=0", "optim.schedule.name=constant",
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[str, str]:
    """16 training images and 6 of evaluation."""
    return noise_shards(tmp_path_factory.mktemp("shards"))


def replayed(config: Config, ranks: int) -> list[str]:
    """The lines, which are the same on every rank."""
    everyone = run_distributed(lambda world: replay.replay(config, None), ranks, init=False)
    assert all(lines == everyone[0] for lines in everyone)
    return everyone[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_with_weights_beyond_all_bounds_is_repeated_on_as_many_ranks_and_on_one(engine, settings, tmp_path):
    """Step 1 moves every weight by 1e25, and step 2 overflows: really, and in the same layer each time."""
    config = settings(*OWN, ENGINES[engine], "optim.lr=1e25", task="simmim")
    assert run_distributed(lambda world: train.train(config), 2, init=False) == [EXIT_FAILED] * 2
    run_dir = Path(config.run_dir)
    before, kept = run_dir / "checkpoints" / "step_00000001", run_dir / "bad_steps" / "checkpoints" / "step_00000001"
    weights, saved = read_checkpoint_weights(before), read_checkpoint_weights(kept)
    assert all(torch.equal(weights[name], saved[name]) for name in weights)
    for path in (before / "rng").iterdir():
        assert path.read_bytes() == (kept / "rng" / path.name).read_bytes()
    record = json.loads((run_dir / "bad_steps" / "step_00000002.json").read_text())
    images = [image for passes in record["images"] for rows in passes for image in rows]
    assert len(record["images"]) == 2 and len({key for _, key in images}) == len(images) == 8
    assert all(Path(shard).suffix == ".tar" for shard, _ in images)

    same = replayed(config, 2)
    assert same[-1].startswith("step 2 here: not finite again (")
    for rank in (0, 1):
        first = [line for line in same if line.startswith(f"rank {rank}, micro-batch 1: the output of encoder.")]
        assert len(first) == 1 and "is the first that is not finite" in first[0]
    assert not any(line.startswith("note: ") for line in same)
    other = replayed(config, 1)
    assert "note: 1 ranks take it here and 2 did in the run" in other[1]
    assert other[-1].startswith("step 2 here: not finite again (")


def test_a_fault_that_was_not_the_models_is_not_repeated(settings):
    """As of a card: the loss of one rank is NaN where nothing computed it."""
    config = settings(*OWN, "engine=zero1", task="simmim")

    def faulty(world: World) -> Any:
        true_loss = SimMIMTask.loss
        if world.rank == 1:
            SimMIMTask.loss = lambda *arguments: true_loss(*arguments) * math.nan  # type: ignore[method-assign]
        return train.train(config)

    assert run_distributed(faulty, 2, init=False) == [EXIT_FAILED] * 2
    lines = replayed(config, 2)
    assert "finite on ranks [1]" in lines[0]
    assert lines[1:] == ["step 1 here: finite, so nothing of the run's fault is repeated"]
