"""What optim.freeze names keeps every bit, with every engine, on any number of ranks and across a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swinv2_train import train
from swinv2_train.checkpoint import find_checkpoint, read_checkpoint_weights
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.configs import composed
from tests.support.harness import run_distributed
from tests.support.shard_files import noise_shards
from tests.support.small_run import SMALL

FROZEN = ("patch_embed", "layers.0")
"""So the block of layers.1 is trained and its input has no gradient: trap 12 of DeepSpeed."""


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint_weights(find_checkpoint(run))


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


@pytest.mark.slow
def test_frozen_parameters_keep_their_bits_and_the_run_resumes_exactly(tmp_path, capfd):
    """Local, and ZeRO 2 and 3 on two ranks: the same losses to rounding; a resume takes the same steps bit for bit, and
    on another number of ranks those of the local engine."""
    shards = noise_shards(tmp_path / "shards")

    def run(name: str, ranks: int, steps: int, *overrides: str) -> Path:
        config = composed([
            "task=classify", "data=cifar10", "model=demo", "task.num_classes=4", *SMALL, *shards, "task.mixup_alpha=0",
            "task.cutmix_alpha=0", f"run_dir={tmp_path}/{name}", f"train.max_steps={steps}", "train.epochs=null",
            "optim.schedule.name=constant", "optim.schedule.warmup_epochs=0", "train.micro_batch_size=4",
            "optim.freeze=[" + ",".join(FROZEN) + "]", "train.checkpoint_every_steps=2", *overrides,
        ])  # fmt: skip
        codes = run_distributed(lambda world: guarded(lambda: train.train(config)), ranks, init=False)
        assert set(codes) == {EXIT_DONE}, capfd.readouterr()
        return tmp_path / name

    fp32 = ("engine.precision=fp32", "engine.persistence_threshold=0")
    zero = {stage: (f"engine=zero{stage}", *fp32) for stage in (2, 3)}
    local = run("local", 1, 4)
    first = run("start", 1, 1, "optim.lr=0")
    for stage, overrides in zero.items():
        run(f"zero{stage}", 2, 2, *overrides)
        found = run(f"zero{stage}", 2, 4, *overrides)
        whole = run(f"whole{stage}", 2, 4, *overrides)
        assert losses(found) == losses(whole) == pytest.approx(losses(local), rel=1e-4)
        for name, value in weights(found).items():
            assert torch.equal(value, weights(whole)[name]), name
            changed = not torch.equal(value, weights(first)[name])
            assert changed != any(pattern in name for pattern in FROZEN), f"{name} under ZeRO-{stage}"
    run("elastic", 2, 2, *zero[3], "model.recompute=blocks")
    elastic = run("elastic", 1, 4, *zero[3], "model.recompute=blocks", "train.micro_batch_size=2")
    assert losses(elastic) == pytest.approx(losses(local), rel=1e-4)
    for name, value in weights(elastic).items():
        assert value == pytest.approx(weights(local)[name], abs=2e-5), name  # AdamW's step at gradients near 0
