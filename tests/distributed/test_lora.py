"""A run with LoRA: the same on every engine and any number of ranks, and plain weights come out of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import swinv2_train
from swinv2_train import train
from swinv2_train.checkpoint import find_checkpoint, read_checkpoint_weights
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.models.lora import is_adapter
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.training.lora import build_trained_task
from swinv2_train.weights import read_weights
from swinv2_train.weights.export import ExportRequest, export
from tests.support.configs import composed
from tests.support.harness import run_distributed
from tests.support.shard_files import noise_shards
from tests.support.small_run import SMALL

ATOL = 1e-6  # measured worst 1e-7; without the adapters 1e-3


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


@pytest.mark.slow
def test_zero_3_trains_what_the_local_engine_trains_and_gives_plain_weights(tmp_path, capfd):
    shards = noise_shards(tmp_path / "shards")

    def overrides(name: str, steps: int, *more: str) -> list[str]:
        return [
            "task=classify", "data=cifar10", "model=demo", "task.num_classes=4", *SMALL, *shards, "task.mixup_alpha=0",
            "task.cutmix_alpha=0", f"run_dir={tmp_path}/{name}", f"train.max_steps={steps}", "train.epochs=null",
            "optim.schedule.name=constant", "optim.schedule.warmup_epochs=0", "optim.lr=0.01", *more,
        ]  # fmt: skip

    def run(name: str, ranks: int, steps: int, *more: str) -> Path:
        config = composed(overrides(name, steps, *more))
        codes = run_distributed(lambda world: guarded(lambda: train.train(config)), ranks, init=False)
        assert set(codes) == {EXIT_DONE}, capfd.readouterr()
        return tmp_path / name

    base = run("base", 1, 2)
    lora = ("optim.lora.rank=3", "optim.lora.alpha=7", f"task.init_from={base}", "optim.ema_decay=0.5")
    zero_3 = ("engine=zero3", "engine.precision=fp32", "engine.persistence_threshold=0", "model.recompute=blocks")
    local = run("local", 1, 4, *lora)
    run("zero3", 2, 2, *lora, *zero_3)
    found = run("zero3", 1, 4, *lora, *zero_3)
    assert losses(found) == pytest.approx(losses(local), rel=1e-6)
    own, theirs = (read_checkpoint_weights(find_checkpoint(each)) for each in (found, local))
    for name, value in read_checkpoint_weights(find_checkpoint(base)).items():
        assert name.startswith("head.") or torch.equal(own[name], value), name
    for name, value in theirs.items():
        assert torch.allclose(own[name], value, atol=1e-5), name
        assert not name.endswith("lora_B") or value.abs().sum() > 0

    out = tmp_path / "out.safetensors"
    config = composed(overrides("zero3", 4, *lora, *zero_3))
    export(config, ExportRequest("microsoft", out))
    plain, adapted = load_file(out), build_trained_task(config, torch.device("cpu")).module
    assert not any(map(is_adapter, plain)) and plain.keys() == read_checkpoint_weights(find_checkpoint(base)).keys()
    adapted.load_state_dict(dict(own))
    loaded, images = swinv2_train.load(found).module, torch.randn(2, 3, 16, 16)
    assert all(torch.equal(value, plain[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(loaded(images), adapted.eval()(images), atol=ATOL)
    averages = read_weights(found, averaged=True)
    assert averages["head.weight"].shape == plain["head.weight"].shape
    assert not torch.equal(averages["layers.1.blocks.0.mlp.fc2.weight"], plain["layers.1.blocks.0.mlp.fc2.weight"])

    again = run("again", 1, 1, "optim.lora.rank=1", f"task.init_from={found}", "optim.lr=0")
    weights = read_weights(again)
    assert all(torch.equal(weights[name], value) for name, value in plain.items())
