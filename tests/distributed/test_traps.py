"""Each of the twelve traps of DeepSpeed 0.19.8 has its precaution, and fails here without it.

1 clipping by default: test_engine.py (clip 0), unit/test_deepspeed_config.py.  2 `latest` before the end: here and
test_checkpoint.py.  3 several groups: here.  4 stale gradients: here.  5 in-place linear: here.  6 stage 0 with 16 bit:
unit/test_deepspeed_config.py.  7 restarts: test_distributed.py.  8 missing and damaged parts: here.  9 empty
parameters: here, test_engine.py.  10 typos: unit/test_deepspeed_config.py.  11 masters of another parameter: here.
12 gradients taken before they are there: test_freeze.py.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.engine.deepspeed.config import deepspeed_json
from swinv2_train.engine.deepspeed.startup import import_deepspeed
from swinv2_train.engine.model_sizes import layer_sizes
from tests.support.harness import run_distributed, tree
from tests.support.one_rank import ONE
from tests.support.toy import DIM, batches, build, build_toy, full_state, part, save_state, toy_config, train

LOSS_ATOL = 3e-6  # measured worst 4e-7; without the precautions 1e-2 and more


def test_deepspeed_writes_nothing_of_its_own(tmp_path):
    """Trap 2: rank 0 would write `latest` before the other ranks have finished."""
    run_distributed(lambda world: save_state(build(toy_config(), world), tmp_path), 2)
    assert tree(tmp_path) == ["engine.json", "rank_0000.safetensors", "rank_0001.safetensors"]


@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.smoke)])
def test_resume_keeps_each_group_its_own_lr_decay_and_step(stage, tmp_path):
    """Trap 3, same world size: 8 different groups; what the configuration says wins over the file."""

    def groups_of(engine):
        optimizer = engine._ds.optimizer
        steps = [float(state["step"]) for state in getattr(optimizer, "optimizer", optimizer).state.values()]
        groups = [(g["name"], g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups]
        return groups, steps

    def first(world):
        engine = build(toy_config(stage=stage), world)
        train(engine, world, 3)
        save_state(engine, tmp_path / "state")
        return groups_of(engine), train(engine, world, 2, first=3)

    def second(world):
        engine = build(toy_config(stage=stage), world, seed=5)
        engine.load(tmp_path / "state")
        at_load = groups_of(engine)
        history = train(engine, world, 2, first=3)
        return at_load, history, groups_of(engine)[1]

    def other_decay(world):
        engine = build(toy_config(stage=stage, weight_decay=0.2), world)
        engine.load(tmp_path / "state")
        return sorted({g["weight_decay"] for g in engine._ds.optimizer.param_groups})

    saved, expected = run_distributed(first, 2)[0]
    at_load, history, steps = run_distributed(second, 2)[0]
    assert at_load == saved
    assert len({group[1] for group in saved[0]}) > 3, "the groups must differ for the test to mean something"
    assert set(saved[1]) == {3.0}
    assert history == expected
    assert set(steps) == {5.0}
    assert run_distributed(other_decay, 2)[0] == [0.0, 0.2]


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, "none"), *[(stage, offload) for stage in (1, 2, 3) for offload in ("none", "cpu")]]
)
@pytest.mark.parametrize("micros", [1, 2])
def test_parameters_without_a_gradient_get_a_gradient_of_zero(stage, micros, offload):
    """Trap 4: ZeRO-3 would apply their last gradient again.  The extra branch is used in every third step only."""

    def run(world, config):
        engine = build(config, world, micros)
        losses = []
        for step, batch in enumerate(batches(7, 16)):
            for micro in range(micros):
                inputs = part(batch, world.rank, world.world_size, micro, micros)
                outputs = engine.forward(**inputs, use_extra=torch.tensor(step % 3 == 0))
                engine.backward(outputs["loss"])
            engine.step(1e-2)
            losses.append(float(engine.evaluate(**part(batch, 0, 1, 0, 1))["loss"]))
        return losses

    expected = run(ONE, toy_config("local", micro=16 // micros))
    losses = run_distributed(run, 2, toy_config(stage=stage, micro=8 // micros, offload_optimizer=offload))[0]
    assert losses == pytest.approx(expected, abs=LOSS_ATOL)


def test_selective_recomputation_gives_the_right_gradients_under_zero_3():
    """Trap 5: DeepSpeed's own linear adds the bias in place to a product that selective recomputation keeps."""
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    keep = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

    def grad_norm(world, selective, memory_efficient):
        deepspeed = import_deepspeed()
        settings = deepspeed_json(toy_config(micro=8), world.world_size, 1, layer_sizes(build_toy(), ()))
        settings["zero_optimization"]["memory_efficient_linear"] |= memory_efficient
        deepspeed.init_distributed(auto_mpi_discovery=False)
        with deepspeed.zero.Init(config_dict_or_path=settings):
            torch.manual_seed(0)
            module = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), torch.nn.Tanh(), torch.nn.Linear(DIM, DIM))
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=torch.optim.AdamW(module.parameters(), lr=1e-2), config=settings
        )
        inner = engine.module.forward
        if selective:
            contexts = functools.partial(create_selective_checkpoint_contexts, keep)
            engine.module.forward = lambda x: checkpoint(inner, x, use_reentrant=False, context_fn=contexts)
        torch.manual_seed(world.rank)
        engine.backward(engine(torch.randn(2, 4, DIM)).square().mean())
        engine.step()
        return float(engine.get_global_grad_norm())

    def run(world):
        return [grad_norm(world, *case) for case in ((False, False), (True, False), (True, True))]

    plain, selective, in_place = run_distributed(run, 2)[0]
    assert selective == pytest.approx(plain, rel=1e-6)
    assert in_place != pytest.approx(plain, rel=1e-2), "DeepSpeed has fixed it: the precaution can go"


def test_missing_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path):
    """Trap 8: DeepSpeed returns (None, None) with a warning and trains from scratch."""

    def load(world):
        engine = build(toy_config(), world)
        with pytest.raises(ConfigError, match="no engine state here"):
            engine.load(tmp_path / "nowhere")

    run_distributed(load, 2)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
@pytest.mark.parametrize("stage", [1, 3])
def test_damaged_part_of_one_rank_stops_all_ranks(stage, damage, tmp_path):
    """Trap 8: only that rank would raise, the others would wait for it until the timeout."""
    run_distributed(lambda world: save_state(build(toy_config(stage=stage), world), tmp_path), 2)
    victim = tmp_path / "rank_0001.safetensors"
    if damage == "missing":
        victim.unlink()
    else:
        os.truncate(victim, 0 if damage == "empty" else victim.stat().st_size // 2)

    def load(world):
        engine = build(toy_config(stage=stage), world)
        with pytest.raises(ConfigError, match=r"rank 1: .*rank_0001\.safetensors: (missing|cannot be read)"):
            engine.load(tmp_path)

    run_distributed(load, 2)


def test_whole_tensors_come_out_although_the_parameters_are_empty():
    """Trap 9: module.state_dict() under ZeRO-3 holds tensors of shape (0,), and that is no error anywhere."""

    def run(world):
        engine = build(toy_config(), world)
        assert {tuple(p.shape) for p in engine.module.parameters()} == {(0,)}
        return full_state(engine)

    state, nothing = run_distributed(run, 2)
    assert nothing is None
    for name, value in build_toy().state_dict().items():
        assert torch.equal(state[name], value)


def test_round_robin_gradients_are_refused_because_masters_are_mixed_up():
    """Trap 11: the flat groups are shuffled, the addresses of the parameters in them are not."""
    overrides = {"zero_optimization": {"round_robin_gradients": True}}
    with pytest.raises(ConfigError, match=r"zero_optimization\.round_robin_gradients: DeepSpeed then takes another"):
        build(toy_config(stage=2, overrides=overrides), ONE)

    def run(world):
        from deepspeed.utils import safe_get_full_fp32_param

        deepspeed = import_deepspeed()
        settings = deepspeed_json(toy_config(stage=2), world.world_size, 1, layer_sizes(build_toy(), ()))
        settings["zero_optimization"] |= overrides["zero_optimization"]
        deepspeed.init_distributed(auto_mpi_discovery=False)
        module = build_toy()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        return all(torch.equal(safe_get_full_fp32_param(p), p) for p in engine.module.parameters())

    assert not run_distributed(run, 2)[0], "DeepSpeed has fixed it: the precaution can go"
