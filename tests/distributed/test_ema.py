"""Averages of the weights (optim.ema_decay) under every ZeRO stage: the right numbers, and they outlive all changes."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import compose_source
from swinv2_train.engine import NonFiniteError
from swinv2_train.engine.state.consolidate import read_state_weights
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.weights import read_weights as read_file
from swinv2_train.weights.export import ExportRequest, export
from tests.distributed.test_elastic import SMALL, SUB_GROUPS, shards, start, step_of  # noqa: F401  a fixture
from tests.support.evaluation import evaluated
from tests.support.harness import run_distributed
from tests.support.toy import batches, build, build_toy, full_state, part, save_state, toy_config, train

DECAY = 0.9
ATOL = 1e-6  # measured worst 1.5e-7 over 8 steps, all stages and precisions; averaging before the step: 4e-3
LOCAL_ATOL = 1e-6  # measured worst 6.0e-8 after 12 steps
SCORE_RTOL = 1e-6  # measured worst 2e-8; the averages score 9e-3 otherwise than the weights
CPU = {"offload_optimizer": "cpu", "offload_param": "cpu"}
CASES = [
    *[(stage, "fp32", {}) for stage in (0, 2, 3)],
    (1, "bf16", {}),
    (2, "bf16", {"offload_optimizer": "cpu"}),
    (3, "bf16", {"persistence": 100_000}),  # gathered weights that stay gathered would hide the averages
    (3, "fp32", {**CPU, "overrides": SUB_GROUPS}),
]


def averaging(config, decay=DECAY):
    config.optim.ema_decay = decay
    return config


def averages(engine):
    """The averages whole, on rank 0."""
    with engine.ema_weights():
        return full_state(engine)


def spoil(engine, world):
    """A step that is refused on all ranks."""
    loss = engine.forward(**part(batches(1, 16)[0], world.rank, world.world_size, 0, 1))["loss"]
    engine.backward(loss * float("nan"))
    with pytest.raises(NonFiniteError):
        engine.step(1e-2)


@pytest.mark.parametrize(("stage", "precision", "other"), CASES)
def test_averages_are_those_of_the_masters_and_training_is_the_same_with_and_without(stage, precision, other):
    """Each step's masters averaged in float64 are the reference, with changing rates and a refused step; scoring the
    averages uses them, and leaves no trace."""
    batch = part(batches(1, 16)[0], 0, 1, 0, 1)

    config = toy_config(stage=stage, precision=precision, micro=8, **other)

    def run(world):
        engine = build(averaging(copy.deepcopy(config)), world)
        expected = {name: value.double() for name, value in (full_state(engine) or {}).items()}
        history = []
        for step in range(8):
            if step == 5:
                spoil(engine, world)
            history += train(engine, world, 1, first=step)
            for name, value in (full_state(engine) or {}).items():
                expected[name] = DECAY * expected[name] + (1 - DECAY) * value.double()
        before = full_state(engine), engine.evaluate(**batch)["logits"]
        with engine.ema_weights():
            found, logits = full_state(engine), engine.evaluate(**batch)["logits"]
        after = full_state(engine), engine.evaluate(**batch)["logits"]
        history += train(engine, world, 3, first=8)
        with_averages = history, full_state(engine)
        engine = build(config, world)
        history = train(engine, world, 5)
        spoil(engine, world)
        history += train(engine, world, 6, first=5)
        return expected, found, logits, before, after, with_averages, (history, full_state(engine))

    (expected, found, logits, before, after, with_averages, without), (_, _, other_logits, *_) = run_distributed(run, 2)
    worst = max(float((found[name] - value).abs().max()) for name, value in expected.items())
    assert worst < ATOL
    assert any(not torch.equal(found[name], before[0][name]) for name in found), "the averages must differ"
    assert all(torch.equal(after[0][name], before[0][name]) for name in found)
    assert torch.equal(after[1], before[1])
    model = build_toy()
    model.load_state_dict(found)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
        model.center = found["center"].clone()
    torch.testing.assert_close(logits, model.eval()(**batch)["logits"].detach(), rtol=0, atol=1e-5)
    assert torch.equal(logits, other_logits)
    assert with_averages[0] == without[0]
    assert all(torch.equal(with_averages[1][name], value) for name, value in without[1].items())


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_weights_are_back_after_an_error_too(stage):
    """What scores the averages may fail on all ranks; who goes on then must not go on with them."""

    def run(world):
        batch = part(batches(1, 16)[0], 0, 1, 0, 1)
        engine = build(averaging(toy_config(stage=stage, micro=8, persistence=100)), world)
        train(engine, world, 3)
        before = engine.evaluate(**batch)["logits"]
        with pytest.raises(ValueError, match="unread image"), engine.ema_weights():
            inside = engine.evaluate(**batch)["logits"]
            raise ValueError("unread image")
        return before, inside, engine.evaluate(**batch)["logits"]

    for before, inside, after in run_distributed(run, 2):
        assert not torch.equal(before, inside)
        assert torch.equal(before, after)


CHAIN = [
    ("deepspeed", 3, "fp32", 2, {}),
    ("deepspeed", 2, "fp32", 1, {}),
    ("local", 0, "fp32", 1, {}),
]
"""Name, stage, precision, ranks and what else changes."""
DETOUR = [
    ("deepspeed", 1, "bf16", 3, {"layer_decay": 1.0}),
    ("deepspeed", 3, "bf16", 2, {**CPU, "overrides": SUB_GROUPS, "persistence": 40}),
]


def engine_of(world, case, seed=0):
    name, stage, precision, size, other = case
    return build(averaging(toy_config(name, stage, precision, micro=12 // size, **other)), world, seed=seed)


def test_averages_go_on_at_other_ranks_stages_and_engines(tmp_path):
    """Two ranks, one, and plain torch, four steps each, with detours that change no bit: as if nothing had changed."""

    def leg(world, number, case, steps):
        engine = engine_of(world, case, seed=number)
        if number:
            engine.load(tmp_path / str(number - 1))
        before = averages(engine)
        train(engine, world, steps, first=4 * number if steps else 0, size=12)
        save_state(engine, tmp_path / (str(number) if steps else "detour"))
        return before, averages(engine)

    def undisturbed(world):
        engine = engine_of(world, CHAIN[-1])
        train(engine, world, 12, size=12)
        return averages(engine)

    kept = None
    for number, case in enumerate(CHAIN):
        before, after = run_distributed(lambda world, n=number, c=case: leg(world, n, c, 4), case[3])[0]
        assert kept is None or all(torch.equal(before[name], value) for name, value in kept.items())
        kept = after
        stored = read_state_weights(tmp_path / str(number), averaged=True)
        assert all(torch.equal(stored[name], value) for name, value in kept.items())
    expected = run_distributed(undisturbed, 1)[0]
    worst = max(float((kept[name] - value).abs().max()) for name, value in expected.items())
    assert worst < LOCAL_ATOL
    for case in DETOUR:
        before, _ = run_distributed(lambda world, c=case: leg(world, len(CHAIN), c, 0), case[3])[0]
        assert all(torch.equal(before[name], value) for name, value in kept.items()), case
        stored = read_state_weights(tmp_path / "detour", averaged=True)
        assert all(torch.equal(stored[name], value) for name, value in kept.items()), case


def test_averages_begin_at_the_weights_where_a_state_has_none_and_can_be_dropped(tmp_path):
    """A state of today's other runs loads, and one with averages loads where none are asked for."""
    plain, with_averages = tmp_path / "plain", tmp_path / "averages"

    def first(world):
        engine = build(toy_config(micro=8), world)
        train(engine, world, 2)
        save_state(engine, plain)

    def second(world):
        engine = build(averaging(toy_config(micro=8)), world)
        engine.load(plain)
        weights, begun = full_state(engine), averages(engine)
        save_state(engine, with_averages)
        return weights, begun

    def third(world):
        engine = build(toy_config(micro=8), world)
        engine.load(with_averages)
        with pytest.raises(AssertionError, match=r"optim\.ema_decay is null"), engine.ema_weights():
            pass
        save_state(engine, tmp_path / "dropped")

    run_distributed(first, 2)
    weights, begun = run_distributed(second, 2)[0]
    assert all(torch.equal(begun[name], value) for name, value in weights.items())
    run_distributed(third, 2)
    for folder, decay in ((plain, None), (with_averages, DECAY), (tmp_path / "dropped", None)):
        assert json.loads((folder / "engine.json").read_text())["ema_decay"] == decay
        if decay is None:
            with pytest.raises(ConfigError, match=r"holds no averages of the weights, as optim\.ema_decay was null"):
                read_state_weights(folder, averaged=True)


def test_averages_take_a_ranks_share_of_four_bytes_a_parameter():
    """As engine/deepspeed/memory.py counts them; nothing without optim.ema_decay."""

    def held(world):
        found = []
        for stage, decay in ((3, None), (0, DECAY), (2, DECAY), (3, DECAY)):
            engine = build(averaging(toy_config(stage=stage, micro=8), decay), world)
            found.append(sum(4 * average.numel() for average in engine._ema._averages))
        return found

    whole = 4 * sum(parameter.numel() for parameter in build_toy().parameters())
    for found in run_distributed(held, 2):
        # padding: a few elements of each parameter (ZeRO-3) or group
        assert found == pytest.approx([0, whole, whole / 2, whole / 2], rel=0.02)


@pytest.mark.slow
def test_killed_run_keeps_its_averages_and_the_commands_take_them(shards, tmp_path, capfd):  # noqa: F811
    """ZeRO-3 on two ranks, killed and resumed: the same averages bit for bit; evaluate and export with ema=true."""
    settings = (
        *SMALL, shards, f"data.eval_shards={shards.removeprefix('data.shards=')}", "train.max_steps=12",
        "train.micro_batch_size=6", "data.num_workers=0", "engine.zero_stage=3", f"optim.ema_decay={DECAY}",
    )  # fmt: skip
    plain, run_dir = tmp_path / "plain", tmp_path / "run"
    assert start(2, (*settings, f"run_dir={plain}")) == [0, 0]
    assert start(2, (*settings, f"run_dir={run_dir}"), (7, 0.02)) == [None, None]
    assert 3 <= step_of(run_dir) < 12
    assert start(2, (*settings, f"run_dir={run_dir}")) == [0, 0]
    expected, found = (read_file(folder, averaged=True) for folder in (plain, run_dir))
    weights = read_file(run_dir)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not torch.equal(found["encoder.norm.weight"], weights["encoder.norm.weight"])

    scores = read_metrics(run_dir)[-1]
    lines = [
        evaluated(capfd, f"run_dir={run_dir}", *more, ranks=ranks) for more, ranks in (((), 1), (("ema=true",), 2))
    ]
    assert [line["ema"] for line in lines] == [False, True]
    assert lines[0]["val/loss"] == pytest.approx(scores["val/loss"], rel=SCORE_RTOL)
    assert lines[1]["val/loss"] == pytest.approx(scores["val_ema/loss"], rel=SCORE_RTOL)
    assert abs(scores["val/loss"] / scores["val_ema/loss"] - 1) > 10 * SCORE_RTOL

    out = tmp_path / "averages.safetensors"
    export(compose_source([f"run_dir={run_dir}"], ())[0], ExportRequest("microsoft", out, ema=True))
    assert json.loads(capfd.readouterr().out)["ema"] is True
    exported = read_file(out)
    assert exported.keys() and all(torch.equal(tensor, found[name]) for name, tensor in exported.items())
