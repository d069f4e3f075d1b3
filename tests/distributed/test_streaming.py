"""Whole tensors pass through an engine and out of its checkpoints one at a time, bit for bit, whatever the sharding."""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from pathlib import Path

import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.engine import build_engine
from swinv2_train.engine.deepspeed.config import deepspeed_json
from swinv2_train.engine.deepspeed.startup import import_deepspeed
from swinv2_train.engine.model_sizes import layer_sizes
from swinv2_train.engine.state.consolidate import read_state_weights
from swinv2_train.storage.lazy_tensors import LazyTensor, LazyTensors
from swinv2_train.training.param_groups import build_param_groups
from tests.support.harness import run_distributed
from tests.support.one_rank import ONE
from tests.support.toy import batches, build_toy, full_state, part, save_state, toy_config, train

LAYOUTS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
CASES = [
    *[(stage, precision, "none", size, {}) for stage, precision in LAYOUTS for size in (1, 2, 3)],
    *[(stage, precision, "cpu", 2, {}) for stage, precision in LAYOUTS if stage],
    (3, "bf16", "cpu", 3, {"zero_optimization": {"sub_group_size": 300}}),  # groups in several flat tensors
]


def build(world, config, seed=0):
    """The toy with a parameter of one element (2 of 3 ranks hold padding only) and two that are not trained."""
    module = build_toy(seed=seed)
    module.gain = torch.nn.Parameter(torch.ones(1))
    module.extra.requires_grad_(False)
    return build_engine(module, build_param_groups(module, config.optim), config, world, 1, ())


def expected_of(value, name, precision):
    """What is not trained has no master: it is kept in the weights' own precision."""
    return value.bfloat16().float() if precision == "bf16" and name.startswith("extra.") else value


@pytest.mark.parametrize(("stage", "precision", "offload", "size", "overrides"), CASES)
def test_tensors_go_in_and_come_out_of_engine_and_checkpoint_unchanged(
    stage, precision, offload, size, overrides, tmp_path
):
    """A part of the model is loaded, the rest stays; then training, and the checkpoint equals what DeepSpeed says of
    its own engine."""
    config = toy_config(stage=stage, precision=precision, offload_optimizer=offload, overrides=overrides)
    wanted = {name: value + 1e-3 for name, value in build_toy(seed=7).state_dict().items() if "blocks.0" not in name}

    def run(world):
        engine = build(world, config)
        before = full_state(engine)
        engine.load_full(wanted if world.is_main else None)
        after = full_state(engine)
        logits = engine.evaluate(**part(batches(1, 12)[0], 0, 1, 0, 1))["logits"]
        train(engine, world, 2, size=12)
        save_state(engine, tmp_path)
        return before, after, logits, full_state(engine), [name for name, _ in engine.module.named_parameters()]

    (before, after, logits, trained, parameters), *others = run_distributed(run, size)
    assert list(after) == [*parameters, "center"]
    for name, value in after.items():
        expected = expected_of(wanted[name], name, precision) if name in wanted else before[name]
        assert value.dtype == torch.float32 and torch.equal(value, expected), name
    model = build_toy()
    model.load_state_dict({name: after[name] for name in model.state_dict()})
    if precision == "bf16":
        model.to(torch.bfloat16).center = after["center"]
    torch.testing.assert_close(logits, model.eval()(**part(batches(1, 12)[0], 0, 1, 0, 1))["logits"], rtol=0, atol=1e-5)
    assert all(torch.equal(logits, other[2]) for other in others)

    found = read_state_weights(tmp_path)
    assert found.keys() == trained.keys()
    assert not torch.equal(trained["head.weight"], after["head.weight"])
    for name, value in trained.items():
        assert found.entries[name][:2] == (value.shape, value.dtype)
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_local_engine_streams_too(tmp_path):
    engine = build(ONE, toy_config("local"))
    wanted = build_toy(seed=7).state_dict()
    engine.load_full(LazyTensors({name: lazy(value) for name, value in wanted.items()}))
    save_state(engine, tmp_path)
    found = read_state_weights(tmp_path)
    assert all(torch.equal(found[name], wanted.get(name, torch.ones(1))) for name in [*wanted, "gain"])
    state = full_state(engine)
    assert found.keys() == state.keys()
    train(engine, ONE, 1)
    assert all(torch.equal(state[name], found[name]) for name in found), "a copy, not the weight that training changes"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loading_works_into_parameters_built_under_zero_init(precision):
    """A model too large for one process is built so; every weight is a shard from its first moment on."""
    config = toy_config(precision=precision)
    wanted = {name: value + 1e-3 for name, value in build_toy(seed=7).state_dict().items()}

    def run(world, sharded):
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(auto_mpi_discovery=False)
        settings = deepspeed_json(config, world.world_size, 1, layer_sizes(build_toy(), ()))
        with deepspeed.zero.Init(config_dict_or_path=settings, enabled=sharded):
            module = build_toy()
        assert sharded == all(p.numel() == 0 for p in module.parameters())
        engine = build_engine(module, build_param_groups(module, config.optim), config, world, 1, ())
        engine.load_full(wanted if world.is_main else None)
        state = full_state(engine)
        return state, train(engine, world, 3)

    (state, history), _ = run_distributed(run, 2, True)
    assert all(torch.equal(state[name], value) for name, value in wanted.items())
    assert history == run_distributed(run, 2, False)[0][1]


# --------------------------------------------------------------------------------------------------------------------
# Reading


def lazy(value, read=None):
    return LazyTensor(tuple(value.shape), value.dtype, read or value.clone)


@pytest.mark.parametrize("stage", [1, 3])
def test_one_tensor_is_read_at_a_time_once_and_on_rank_0_only(stage):
    def run(world):
        last, reads = [lambda: None], []

        def reader(name, value):
            def read():
                deadline = time.monotonic() + 5  # gloo's thread lets go of what it has sent a moment later
                while last[0]() is not None and time.monotonic() < deadline:
                    time.sleep(0.001)
                assert last[0]() is None, "the tensor before it is still in memory"
                tensor = value.clone()
                last[0] = weakref.ref(tensor)
                reads.append(name)
                return tensor

            return read

        state = {name: lazy(value, reader(name, value)) for name, value in build_toy(seed=7).state_dict().items()}
        build(world, toy_config(stage=stage)).load_full(LazyTensors(state) if world.is_main else None)
        return reads, list(state)

    (reads, names), (other_reads, _) = run_distributed(run, 2)
    assert reads == names and other_reads == []


@pytest.mark.parametrize("failure", ["raises", "has another shape"])
def test_tensor_that_cannot_be_read_stops_all_ranks_together(failure):
    """Rank 0 alone knows; the others are waiting for its broadcast.  Nobody must train on half-loaded weights."""

    def read():
        if failure == "raises":
            raise OSError("the disk is gone")
        return torch.zeros(3)

    def run(world):
        engine = build(world, toy_config(stage=3))
        state = {name: lazy(value) for name, value in build_toy(seed=7).state_dict().items()}
        state["extra.weight"] = state["extra.weight"]._replace(read=read)
        with pytest.raises(ConfigError) as caught:
            engine.load_full(LazyTensors(state) if world.is_main else None)
        return str(caught.value)

    text, other = run_distributed(run, 2)
    assert text == other
    reason = "OSError: the disk is gone" if failure == "raises" else "RuntimeError: shape '[16, 16]' is invalid"
    assert f"rank 0: extra.weight: cannot be read ({reason}" in text
    assert "some weights are already replaced and some are not, so mend the file and start again" in text


@pytest.mark.parametrize("name", ["local", "deepspeed"])
def test_weights_that_do_not_fit_are_refused_before_any_is_read(name):
    def read():
        raise AssertionError("read")

    def run(world):
        engine = build(world, toy_config(name))
        state = {name: lazy(value, read) for name, value in build_toy().state_dict().items()}
        state["head.weight"] = state["head.weight"]._replace(shape=(3, 3))
        with pytest.raises(ConfigError, match=r"head\.weight has shape \(3, 3\), the model \(5, 16\)"):
            engine.load_full(LazyTensors(state) if world.is_main else None)

    run_distributed(run, 1 if name == "local" else 2)


# --------------------------------------------------------------------------------------------------------------------
# Damaged and foreign files


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[int, Path]:
    """A checkpoint of 2 ranks by ZeRO stage; do not change it."""
    folder = tmp_path_factory.mktemp("saved")
    for stage in (0, 1, 3):
        run_distributed(lambda world, s=stage: save_state(build(world, toy_config(stage=s)), folder / str(s)), 2)
    return {stage: folder / str(stage) for stage in (0, 1, 3)}


@pytest.fixture
def copy(saved, tmp_path):
    import shutil

    return lambda stage: Path(shutil.copytree(saved[stage], tmp_path / "copy"))


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "no header"])
@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_missing_or_damaged_file_of_any_rank_is_named(rank, stage, damage, copy):
    directory = copy(stage)
    path = directory / f"rank_{rank:04d}.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "no header":
        path.write_bytes(b"\0" * path.stat().st_size)
    else:
        os.truncate(path, 0 if damage == "empty" else path.stat().st_size // 2)
    with pytest.raises(ConfigError, match=rf"{path}: (missing|cannot be read \(.+\)); choose another checkpoint"):
        read_state_weights(directory)


def test_piece_that_no_file_holds_is_missed(saved, copy):
    """A file of another run that lies there whole."""
    directory = copy(3)
    (directory / "rank_0001.safetensors").write_bytes((saved[0] / "rank_0001.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"128 of 256 elements of patch_embed\.weight \(weight\) are in no file"):
        dict(read_state_weights(directory))


def test_folder_that_is_no_engine_state_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no engine state here \(engine\.json is missing\)"):
        read_state_weights(tmp_path)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_holds_no_code(stage, saved):
    """It may come from someone else: numbers and text, nothing that is unpickled."""
    names = {path.name for path in saved[stage].rglob("*")}
    assert names == {"engine.json", "rank_0000.safetensors", "rank_0001.safetensors"}


def test_a_checkpoint_of_deepspeeds_own_files_is_refused_by_its_age(copy):
    directory = copy(3)
    (directory / "engine.json").write_text('{"engine": "deepspeed", "world_size": 2, "zero_stage": 3}')
    with pytest.raises(ConfigError, match=r"written by a version before .*task\.init_from"):
        read_state_weights(directory)


# --------------------------------------------------------------------------------------------------------------------
# Memory


LARGEST = 1024 * 1024 * 4
"""Bytes of each of the 32 parameters below.  Whoever collects the model holds 32 times as much."""
BOUNDS = (6.0, 6.0, 1.5)  # worst of 20 runs beside others: 4.05 (3.04 as a rule), 3.07, 1.00


def many_layers():
    module = torch.nn.Module()
    module.layers = torch.nn.ModuleList([torch.nn.Linear(1024, 1024, bias=False) for _ in range(32)])
    return module


def memory_bytes(key):
    """A line of this process's status: VmHWM peak of, VmRSS all resident memory, RssAnon without pages of files."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def peak_bytes(function):
    """Resident memory that the call adds to this process at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory_bytes("VmRSS")
    function()
    return memory_bytes("VmHWM") - before


def test_no_rank_holds_more_than_a_few_parameters_while_weights_come_and_go(tmp_path):
    """ZeRO-3 on 2 ranks: into the engine, out of it, and out of its checkpoint, whose mapped pages do not count."""

    def run(world):
        ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back, fragments do not count
        module = many_layers()
        config = toy_config(layer_decay=1.0)
        config.optim.no_decay = []
        engine = build_engine(module, build_param_groups(module, config.optim), config, world, 1, ())
        state = {f"layers.{i}.weight": lazy(torch.empty(0), lambda i=i: torch.full((1024, 1024), i)) for i in range(32)}
        state = {name: entry._replace(shape=(1024, 1024)) for name, entry in state.items()}

        def load():
            engine.load_full(LazyTensors(state) if world.is_main else None)

        def export():
            for i, (_, tensor) in enumerate(engine.full_tensors()):
                assert (tensor is None) if not world.is_main else tensor.eq(i).all()

        load()  # what is made once is made now
        peaks = [peak_bytes(load), peak_bytes(export)]
        save_state(engine, tmp_path)
        weights = read_state_weights(tmp_path)
        before = memory_bytes("RssAnon")
        return [*peaks, max(memory_bytes("RssAnon") - before for value in weights.values() if value.numel())]

    for peaks in run_distributed(run, 2):
        assert all(peak < bound * LARGEST for peak, bound in zip(peaks, BOUNDS, strict=True)), [
            round(peak / LARGEST, 2) for peak in peaks
        ]
