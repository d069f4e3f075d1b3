"""Averages of the weights (optim.ema_decay) with plain torch: the numbers, what is refused, and the way from a run's
metrics to the commands."""

from __future__ import annotations

import json

import pytest
import torch

from swinv2_train.checkpoint import ema_note, find_checkpoint, read_checkpoint_weights
from swinv2_train.config import ConfigError, HardwareConfig
from swinv2_train.config.command_line import compose_source
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.engine import NonFiniteError
from swinv2_train.engine.memory import EMA
from swinv2_train.engine.state.ema import SWAPPED_TOGETHER, WeightEMA
from swinv2_train.export import parse
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.planning.hardware import fill_from_machine
from swinv2_train.planning.memory import plan_memory
from swinv2_train.planning.search import Search
from swinv2_train.weights import read_weights
from swinv2_train.weights.export import ExportRequest, export
from tests.support.configs import composed
from tests.support.evaluation import evaluated
from tests.support.one_rank import ONE
from tests.support.small_run import run_alone
from tests.support.toy import batches, build, build_toy, full_state, part, toy_config, train

pytestmark = pytest.mark.slow

BATCH = part(batches(1, 16)[0], 0, 1, 0, 1)
ATOL = 2e-6  # measured worst 4.9e-7 over 40 steps of all decays; averaging a refused step: 4e-4, before a step: 4e-3


def toy_engine(decay: float | None):
    config = toy_config("local", micro=16)
    config.optim.ema_decay = decay
    return build(config, ONE)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_averages_follow_the_formula_over_steps_of_changing_rates(decay):
    """In float64 from each step's weights; a refused step has no part; from the first step on the decay is the same."""
    engine = toy_engine(decay)
    expected = {name: value.double() for name, value in full_state(engine).items()}
    for step in range(40):
        if step == 3:
            engine.backward(engine.forward(**BATCH)["loss"] * float("nan"))
            with pytest.raises(NonFiniteError):
                engine.step(1e-2)
        train(engine, ONE, 1, first=step)
        for name, value in full_state(engine).items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    with engine.ema_weights():
        found = full_state(engine)
    assert max(float((found[name] - value).abs().max()) for name, value in expected.items()) < ATOL


def test_averages_serve_as_weights_for_a_while_and_training_never_knows():
    """Also when what is done with them fails; a step with them in place is a mistake of the program."""
    engine, plain = toy_engine(0.9), toy_engine(None)
    assert train(engine, ONE, 4) == train(plain, ONE, 4)
    with engine.ema_weights():
        averages, logits = full_state(engine), engine.evaluate(**BATCH)["logits"]
    model = build_toy()
    model.load_state_dict(averages)
    assert torch.equal(logits, model.eval()(**BATCH)["logits"])
    with pytest.raises(ValueError, match="unread image"), engine.ema_weights():
        raise ValueError("unread image")
    with pytest.raises(AssertionError, match="in use as weights"), engine.ema_weights():
        engine.snapshot(copy=False)
    assert train(engine, ONE, 4, first=4) == train(plain, ONE, 4, first=4)
    assert all(torch.equal(full_state(engine)[name], value) for name, value in full_state(plain).items())
    with pytest.raises(AssertionError, match=r"optim\.ema_decay is null"), plain.ema_weights():
        pass
    assert not [name for name in plain.snapshot(copy=False).tensors if name.startswith("ema/")]


def test_swap_is_exact_beyond_what_is_swapped_together():
    """Not a number, minus zero and all other bits; tensors of more elements than one portion."""
    numbers = torch.arange(SWAPPED_TOGETHER + 3, dtype=torch.int32).mul_(2654435).view(torch.float32)
    master = numbers.clone()
    averages = WeightEMA([master], 0.9)
    master.copy_(numbers.flip(0))
    averages.swap()
    assert torch.equal(master.view(torch.int32), numbers.view(torch.int32))
    averages.swap()
    assert torch.equal(master.view(torch.int32), numbers.flip(0).view(torch.int32))


def test_loaded_and_drawn_weights_are_where_averages_begin():
    engine = toy_engine(0.9)
    train(engine, ONE, 2)
    wanted = build_toy(seed=5).state_dict()
    engine.load_full(wanted)
    with engine.ema_weights():
        assert all(torch.equal(value, wanted[name]) for name, value in full_state(engine).items())


SMALL = ("run_dir=unused", "data.shards=unused", "task=classify", "model=demo", "model.img_size=32")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.ema_decay=1"], r"optim\.ema_decay \(1\.0\) must be at least 0 and less than 1"),
        (
            ["engine=zero3_nvme", "engine.nvme_dir=disk"],
            r"optim\.ema_decay \(0\.9\) with engine\.offload_optimizer \(nvme\) .* weights on disk; set "
            r"optim\.ema_decay=null, or offload to cpu",
        ),
        (
            ["engine.zero_stage=2", "engine.optimizer_states=bf16", "optim.betas=[0.9,0.99]"],
            r"optim\.ema_decay \(0\.9\) with engine\.optimizer_states \(bf16\): the averages are of float32 masters",
        ),
        (
            ["optim.ema_decay=null", "train.keep_best=val_ema/top1", "data.eval_shards=unused"],
            r"train\.keep_best \(val_ema/top1\) needs optim\.ema_decay; set it, or name a val/ score",
        ),
        (["train.keep_best=val_ema/top2", "data.eval_shards=unused"], r"none of .*val_ema/top1"),
    ],
)
def test_what_cannot_be_averaged_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        composed([*SMALL, "optim.ema_decay=0.9", *overrides])


@pytest.mark.parametrize(
    ("engine", "share"),
    [("local", 1.0), ("zero0", 1.0), ("zero1", 0.5), ("zero3", 0.5), ("zero3_offload", 0.5)],
)
def test_plan_counts_four_bytes_a_parameter_sharded_as_the_masters(engine, share):
    """And they rest: every phase has them; offloaded, the host has.  tests/distributed holds it against the engine."""
    ranks = 1 if engine == "local" else 2
    plans = []
    for decay in ("null", "0.9999"):
        config = composed([*SMALL, f"engine={engine}", "hardware=a100_40gb", f"optim.ema_decay={decay}"])
        plans.append(plan_memory(config, _complete(config.hardware, ranks), ranks)[0])
    without, plan = plans
    added = 4 * plan.sizes.parameters * share
    for phase, parts in plan.phases.items():
        more = sum(parts.values()) - sum(without.phases[phase].values())
        assert more == pytest.approx(0 if "offload" in engine else added, abs=4), phase
    assert sum(plan.host.values()) - sum(without.host.values()) == pytest.approx(
        added if "offload" in engine else 0, abs=4
    )


def _complete(hardware: HardwareConfig, ranks: int) -> HardwareConfig:
    return fill_from_machine(hardware, ranks, rates=True)


def test_recommendation_counts_them_too():
    config = composed([*SMALL, "hardware=a100_40gb", "optim.ema_decay=0.9", "model.recompute=none"])
    found = Search(config, _complete(config.hardware, 2), 2).estimates[0]
    assert all(parts[EMA] for parts in found.memory.phases.values())


def test_run_scores_both_keeps_the_best_average_and_the_commands_take_it(settings, tmp_path, capfd):
    """What the run measured of its averages is what evaluate says with ema=true; export writes the same."""
    config = settings(
        "train.max_steps=4", "train.eval_every_steps=2", "train.keep_best=val_ema/loss", "optim.ema_decay=0.7",
        "optim.lr=0.01", "optim.schedule.warmup_steps=0", "optim.schedule.warmup_epochs=null",
    )  # fmt: skip
    assert run_alone(config) == EXIT_DONE
    run_dir = tmp_path / "run"
    scored = [line for line in read_metrics(run_dir) if "val_ema/loss" in line]
    assert [line["step"] for line in scored] == [2, 4]
    assert all({"val/loss", "val/top1", "val/top5", "val_ema/top1", "val_ema/top5"} <= line.keys() for line in scored)
    assert abs(scored[-1]["val_ema/loss"] - scored[-1]["val/loss"]) > 1e-4
    state = json.loads((find_checkpoint(run_dir) / "state.json").read_text())
    assert state["best"] == {"metric": "val_ema/loss", "value": scored[-1]["val_ema/loss"]}

    plain, averaged = (evaluated(capfd, f"run_dir={run_dir}", f"ema={ema}") for ema in ("false", "true"))
    assert (plain["ema"], averaged["ema"]) == (False, True)
    assert plain["val/loss"] == pytest.approx(scored[-1]["val/loss"], rel=1e-6)
    assert averaged["val/loss"] == pytest.approx(scored[-1]["val_ema/loss"], rel=1e-6)

    out = tmp_path / "averages.safetensors"
    export(*parse([f"run_dir={run_dir}", "format=microsoft", f"out={out}", "ema=true"]))
    averages, weights = (read_checkpoint_weights(find_checkpoint(run_dir), averaged) for averaged in (True, False))
    exported = read_weights(out)
    assert set(exported) == set(averages)
    assert all(torch.equal(exported[name], tensor) for name, tensor in averages.items())
    assert not torch.equal(exported["head.weight"], weights["head.weight"])


def test_run_without_averages_says_so_when_they_are_asked_for(settings, tmp_path, capfd):
    """evaluate and export refuse; a resume begins at the weights, or drops what was kept, in a line."""
    assert run_alone(settings("train.max_steps=1")) == EXIT_DONE
    run_dir = tmp_path / "run"
    checkpoint = find_checkpoint(run_dir)
    config = compose_source([f"run_dir={run_dir}"], ())[0]
    refused = r"step_00000001: holds no averages of the weights, as optim\.ema_decay was null; leave ema=true out"
    with pytest.raises(ConfigError, match=refused):
        export(config, ExportRequest("microsoft", tmp_path / "out.safetensors", ema=True))
    with pytest.raises(ConfigError, match=r"ema \(maybe\) must be true or false"):
        parse([f"run_dir={run_dir}", "format=microsoft", "out=o.pth", "ema=maybe"])
    with pytest.raises(ConfigError, match=r"o\.pth is no run or checkpoint of our own, whose averages ema=true takes"):
        read_weights("o.pth", averaged=True)
    assert ema_note(checkpoint, None) is None
    capfd.readouterr()
    assert run_alone(settings("train.max_steps=2", "optim.ema_decay=0.9")) == EXIT_DONE
    begun = capfd.readouterr().out
    assert f"note: {checkpoint} holds no averages of the weights (optim.ema_decay); they begin at its weights" in begun
    assert run_alone(settings("train.max_steps=3")) == EXIT_DONE
    dropped = capfd.readouterr().out
    assert "step_00000002 are dropped, for optim.ema_decay is null" in dropped
    assert not [line for line in read_metrics(run_dir) if line["step"] == 3 and "val_ema/loss" in line]
