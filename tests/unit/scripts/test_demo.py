"""The demo's own decisions: which override goes to which run, and where the images come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts import demo
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.config.load import config_yaml


def test_overrides_of_one_task_go_to_its_run_alone():
    """`make demo DEMO_ARGS=...` must not fail in the phase that does not know a key."""
    overrides = ["train.max_steps=3", "task.mask_ratio=0.5", "task.label_smoothing=0", "+engine.x=1"]
    assert demo.overrides_of(overrides, "simmim") == [overrides[0], overrides[1], overrides[3]]
    assert demo.overrides_of(overrides, "classify") == [overrides[0], overrides[2], overrides[3]]


def test_a_mistyped_key_reaches_validation():
    """It is dropped by neither phase, so validation can name it."""
    assert demo.overrides_of(["task.mask_ration=0.5"], "classify") == ["task.mask_ration=0.5"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_demo_goes_on_in_the_precision_it_was_begun_with(precision, tmp_path: Path):
    """The choice is measured, and a checkpoint of one precision cannot be resumed in the other."""
    config = compose_overrides(["experiment=cifar10_simmim", f"engine.precision={precision}"])
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    assert demo.precision_for(tmp_path) == precision


@pytest.mark.parametrize(("cards", "processes"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_a_machine_with_one_card_trains_on_it(cards, processes, monkeypatch, tmp_path: Path):
    """Two processes would want two; the demo used to leave a single card aside and compute on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    assert demo.num_processes() == processes
    if cards:
        assert demo.precision_for(tmp_path) == "bf16"
