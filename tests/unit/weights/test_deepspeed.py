"""mp_rank_00_model_states.pt as DeepSpeed writes it and pytorch-caney publishes it; SkySense++'s backbone_hr."""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch

from swinv2_train.config import ConfigError
from swinv2_train.models import SimMIM, SwinTransformerV2
from swinv2_train.weights import load_weights, read_weights
from tests.support.weights_samples import (
    SMALL,
    assert_same,
    classifier,
    mmpretrain,
    simmim,
    state_of,
    with_official_buffers,
)

DEEP = {"depths": (1, 1, 42, 1), "in_chans": 14, "extra_norm_period": 6}
"""SatVision's extra norms: seven, in blocks 5, 11, ... of the third stage."""


class Scaler:
    """An object of a program that is not here when the file is read."""

    def __init__(self):
        self.scale, self.history = 2.0**16, [1, 2]


@pytest.fixture
def foreign(monkeypatch):
    """Scaler as a class of a package that vanishes before the file is read."""
    package = types.ModuleType("foreign_trainer")
    package.Scaler = Scaler
    monkeypatch.setitem(sys.modules, "foreign_trainer", package)
    monkeypatch.setattr(Scaler, "__module__", "foreign_trainer")
    yield
    assert "foreign_trainer" not in sys.modules or sys.modules["foreign_trainer"] is package


def model_states(state, **beside):
    """What DeepSpeed's save_checkpoint writes, and objects beside it."""
    moments = {"state": {0: {"exp_avg": torch.ones(1000)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    return {
        "module": state, "buffer_names": [], "optimizer": moments, "param_shapes": None, "lr_scheduler": {"last": 3},
        "skipped_steps": 0, "global_steps": 10, "global_samples": 640, "dp_world_size": 8, "ds_version": "0.14.0",
        "ds_config": {"zero_optimization": {"stage": 2}}, **beside,
    }  # fmt: skip


def caney(**overrides):
    module = simmim(**DEEP, **overrides)
    state = with_official_buffers(state_of(module))
    assert sum(".norm3.weight" in name for name in state) == 7
    return module, state


def test_satvisions_file_is_read_with_its_seven_norms_and_nothing_beside_it(tmp_path, monkeypatch, foreign):
    module, state = caney()
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(model_states(state, loss_scaler=Scaler(), config={"nested": [Scaler()]}), path)
    monkeypatch.delitem(sys.modules, "foreign_trainer")
    encoder = SwinTransformerV2(**{**SMALL, "num_classes": 0, **DEEP})
    model = SimMIM(encoder, encoder_stride=32)
    report = load_weights(model, path)
    assert_same(state_of(module), state_of(model))
    assert report.format == "simmim" and not report.missing and not report.unexpected
    assert {"optimizer.*", "lr_scheduler.*", "foreign_trainer.Scaler (an object)"} <= set(report.left_out)
    assert "foreign_trainer" not in sys.modules


def test_no_extra_norm_vanishes(tmp_path):
    """pytorch-caney's own fine-tuning leaves all seven out, without a word."""
    _, state = caney()
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(model_states(state), path)
    plain = {**SMALL, **DEEP, "extra_norm_period": 0}
    with pytest.raises(
        ConfigError,
        match=r"14 unexpected: layers.2.blocks.5.norm3.* extra_norm_period 6; the model has extra_norm_period 0",
    ):
        load_weights(SwinTransformerV2(**plain), path, head="fresh")
    for block in (5, 41):
        lacking = {name: value for name, value in state.items() if f".2.blocks.{block}.norm3" not in name}
        torch.save(model_states(lacking), path)
        with pytest.raises(ConfigError, match=rf"2 missing: layers.2.blocks.{block}.norm3.weight"):
            load_weights(SwinTransformerV2(**{**SMALL, **DEEP}), path, head="fresh")


def test_the_weights_are_mapped_and_the_optimizer_is_not_touched(tmp_path):
    """Of a file with a large optimizer, what is asked for is what is copied."""
    _, state = caney()
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(model_states(state, moments=torch.ones(2**24)), path)
    weights = read_weights(path)
    name = "encoder.layers.2.blocks.41.norm3.weight"
    assert torch.equal(weights[name], state[name])
    assert not any("moments" in entry for entry in weights.entries)


def test_objects_stand_beside_deepspeeds_weights_alone(tmp_path, monkeypatch, foreign):
    """Elsewhere an unknown object is refused as ever, and among the weights it is no tensor."""
    state = state_of(classifier())
    files = {
        "bare": {**state, "x": Scaler()},
        "other": {"model": state, "x": Scaler()},
        "unmarked": {"module": state, "x": Scaler()},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
    torch.save(model_states({**state, "x": Scaler()}), tmp_path / "among.pt")
    monkeypatch.delitem(sys.modules, "foreign_trainer")
    for name in files:
        with pytest.raises(ConfigError, match="refused, nothing of it was run: it asks for foreign_trainer.Scaler"):
            read_weights(tmp_path / f"{name}.pt")
    with pytest.raises(ConfigError, match=re.escape("'x' is _Inert, not a tensor")):
        read_weights(tmp_path / "among.pt")


def test_code_beside_deepspeeds_weights_is_not_run(tmp_path):
    """os.system is refused as everywhere; another callable becomes a stand-in that is never looked up."""
    import os
    import subprocess

    class Payload:
        def __init__(self, call, argument):
            self.call, self.argument = call, argument

        def __reduce__(self):
            return (self.call, (self.argument,))

    trace, path = tmp_path / "trace", tmp_path / "mp_rank_00_model_states.pt"
    state = state_of(classifier())
    torch.save(model_states(state, evil=Payload(os.system, f"touch {trace}")), path)
    with pytest.raises(ConfigError, match="refused, nothing of it was run"):
        read_weights(path)
    torch.save(model_states(state, evil=Payload(subprocess.getoutput, f"touch {trace}")), path)
    assert_same(state, dict(read_weights(path)))
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload works, so its absence above means something"


def test_skysenses_backbone_hr_is_read_with_its_extra_norms(tmp_path):
    """mmpretrain's names behind backbone_hr., norms of every stage's output, and tokens for annotations beside."""
    small = {"depths": (2, 2, 12, 2), "extra_norm_period": 6, "num_classes": 0}
    model = classifier(**small)
    state = {
        f"backbone_hr.{name.removeprefix('backbone.')}": value for name, value in mmpretrain(state_of(model)).items()
    }
    beside = {f"norm{i}.weight": torch.zeros(8 * 2**i) for i in range(3)}
    beside |= {"mask_token": torch.zeros(1, 1, 8), "vocabulary_token": torch.zeros(9, 8)}
    beside["vocabulary_weight"] = torch.zeros(1, 16)
    state |= {f"backbone_hr.{name}": value for name, value in beside.items()}
    state["backbone_s2.blocks.0.weight"] = torch.zeros(4)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    other = SwinTransformerV2(**{**SMALL, **small})
    report = load_weights(other, tmp_path / "a.pth")
    assert_same(state_of(model), state_of(other))
    assert report.format == "mmpretrain" and not report.missing
    assert set(report.left_out) == {f"backbone_hr.{name}" for name in beside} | {"backbone_s2.*"}
    with pytest.raises(ConfigError, match="extra_norm_period 6; the model has extra_norm_period 0"):
        load_weights(SwinTransformerV2(**{**SMALL, **small, "extra_norm_period": 0}), tmp_path / "a.pth")
    torch.save({"state_dict": state | {"backbone_hr.attn1.proj_in.weight": torch.zeros(4, 8)}}, tmp_path / "b.pth")
    with pytest.raises(
        ConfigError, match="1 unexpected: attn1.proj_in.weight"
    ):  # attention between stages: another model
        load_weights(SwinTransformerV2(**{**SMALL, **small}), tmp_path / "b.pth")
