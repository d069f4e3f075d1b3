"""Weights and optimizer states on disk: the steps of ZeRO-3 in memory, saved and resumed, or a clear refusal."""

from __future__ import annotations

import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.engine import build_engine
from swinv2_train.engine.deepspeed.config import check_engine
from swinv2_train.models import SimMIM, swin_v2
from swinv2_train.models.initial import on_meta
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.training.initial_values import InitialValues
from swinv2_train.training.param_groups import build_param_groups
from tests.support.harness import run_distributed
from tests.support.toy import full_state, save_state, toy_config


def async_io_is_here():
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible(verbose=False)


needs_async_io = pytest.mark.skipif(not async_io_is_here(), reason="DeepSpeed's async_io needs libaio-dev")


def test_nvme_without_libaio_is_refused_by_name_before_any_work(monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "has_function", lambda *args, **kwargs: False)
    with pytest.raises(ConfigError, match=r"libaio.*not here; install libaio-dev \(Debian"):
        check_engine(toy_config(offload_optimizer="nvme", nvme_dir="/tmp/x").engine)


def build_large(world, config, seed):
    """Matrices of 1 MiB and more on each of 2 ranks, which is what DeepSpeed takes to the disk."""
    config.optim.no_decay = ["1d", ".bias", "cpb_mlp", "logit_scale", "mask_token"]
    settings = {"img_size": 32, "window_size": 4, "embed_dim": 256, "depths": (1, 2), "num_heads": (8, 16)}
    with on_meta():
        module = SimMIM(swin_v2("demo", num_classes=0, pretrained_window_sizes=(0, 0), **settings), 8)
    engine = build_engine(module, build_param_groups(module, config.optim), config, world, 1, (SwinBlock,))
    if seed is not None:
        engine.initialise(InitialValues(module, seed))
    return engine


def steps(engine, world, number):
    torch.manual_seed(world.rank)
    losses = []
    for _ in range(number):
        outputs = engine.forward(images=torch.randn(1, 3, 32, 32), mask=torch.rand(1, 8, 8) < 0.5)
        engine.backward(outputs["loss"])
        losses.append(float(outputs["loss"].detach()))
        engine.step(1e-3)
    return losses


@pytest.mark.slow
@needs_async_io
@pytest.mark.parametrize(("states", "weights"), [("nvme", "cpu"), ("nvme", "nvme"), ("cpu", "nvme")])
def test_states_and_weights_on_disk_train_save_and_resume_as_in_memory(states, weights, tmp_path):
    disk = {"offload_optimizer": states, "offload_param": weights, "nvme_dir": str(tmp_path / "disk")}
    derived = dict.fromkeys(("prefetch_bucket_size", "max_reuse_distance", "max_live_parameters"))
    layers = {"layer_decay": 1.0, "persistence": None, **derived}

    def plain(world):
        engine = build_large(world, toy_config(precision="bf16", **layers), 3)
        start = full_state(engine)
        losses = steps(engine, world, 3)
        save_state(engine, tmp_path / "plain")
        return start, losses, steps(engine, world, 3), full_state(engine)

    def swapped(world):
        engine = build_large(world, toy_config(precision="bf16", **layers, **disk), 3)
        start = full_state(engine)
        losses = steps(engine, world, 3)
        save_state(engine, tmp_path / "swapped")
        return start, losses, steps(engine, world, 3), full_state(engine)

    def resumed(world):
        engine = build_large(world, toy_config(precision="bf16", **layers, **disk), None)
        engine.load(tmp_path / "plain")
        after = steps(engine, world, 3), full_state(engine)
        engine.load_full(start if world.is_main else None)
        return *after, full_state(engine)

    start, losses, later, end = run_distributed(plain, 2)[0]
    found_start, found_losses, found_later, found_end = run_distributed(swapped, 2)[0]
    assert list((tmp_path / "disk").rglob("*.swp")), "nothing was taken to the disk"
    assert all(torch.equal(found_start[name], value) for name, value in start.items())
    assert found_losses == losses and found_later == later
    assert all(torch.equal(found_end[name], value) for name, value in end.items())
    losses_after, state_after, loaded = run_distributed(resumed, 2)[0]
    assert losses_after == later
    assert all(torch.equal(state_after[name], value) for name, value in end.items())
    assert all(torch.equal(loaded[name], value) for name, value in start.items())
