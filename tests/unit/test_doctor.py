"""The command that says what a machine lacks."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from swinv2_train import doctor
from swinv2_train.models.kernels import cpu_attention


def ended(capsys) -> tuple[int, str]:
    """Exit code and output of the command."""
    with pytest.raises(SystemExit) as end:
        doctor.main()
    return int(end.value.code or 0), capsys.readouterr().out


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["swinv2-doctor"])


@pytest.mark.parametrize("driver", [True, False])
def test_a_machine_with_a_card_is_asked_for_all_that_its_kernels_need(driver, monkeypatch, capsys):
    """Each requirement by its name, the missing one with what to do, and exit code 1 for scripts."""
    card = SimpleNamespace(name="NVIDIA H200", total_memory=141 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    checks = dict.fromkeys(doctor.REQUIREMENTS, lambda: None)
    checks["libcuda"] = lambda: None if driver else "it is not here; install the driver"
    monkeypatch.setattr(doctor, "REQUIREMENTS", checks)
    code, text = ended(capsys)
    assert "GPU 0: NVIDIA H200, 141 GiB, compute capability 9.0" in text
    assert [f"GPU kernels: {name}" in text for name in checks] == [True] * 5
    assert code == int(not driver)
    assert ("MISSING  GPU kernels: libcuda: it is not here; install the driver" in text) is not driver


def test_a_machine_without_a_card_needs_a_compiler_for_its_own_kernel(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, text = ended(capsys)
    assert code == int(cpu_attention.problem() is not None) and "GPU kernels" not in text and "none that torch" in text
    monkeypatch.setattr(cpu_attention, "problem", lambda: "there is no C++ compiler")
    code, text = ended(capsys)
    assert code == 1 and "MISSING  CPU kernel: there is no C++ compiler" in text


def test_it_takes_no_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["swinv2-doctor", "run_dir=x"])
    assert ended(capsys)[0] == 2
