"""What the tests do with the cards of a machine."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import conftest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "card", "hidden"),
    [
        (["tests/gpu"], True, False),
        (["tests/gpu/test_fused.py::test_x[1]", "tests/gpu/test_step.py"], True, False),
        (["tests/gpu"], False, True),
        (["tests"], True, True),
        (["tests/unit", "tests/gpu"], True, True),
    ],
)
def test_only_a_call_of_the_gpu_tests_alone_sees_cards(arguments, card, hidden, monkeypatch):
    """Two ranks on a machine of one card would be refused, and on two cards they would be other tests: NCCL's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "as it was")
    config = SimpleNamespace(args=arguments, invocation_params=SimpleNamespace(dir=ROOT))
    conftest.pytest_configure(config)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "as it was")
