"""bf16 on a processor without bf16 units: measured once, remembered, and said wherever it costs hours."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.plan import parse, plan
from swinv2_train.report.page import write_report
from swinv2_train.runtime import cpu_speed as subject
from swinv2_train.runtime.cpu_speed import CpuSpeed, cpu_speed, measured, slow_bf16
from tests.support.small_run import run_alone

SLOW = CpuSpeed(100.0, 7.7)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "swinv2_train"


def remember(speed: CpuSpeed) -> None:
    """What a start on such a processor leaves behind, in the place of this one's."""
    cpu_speed()
    directory = subject.cache_directory()
    assert directory is not None
    (file,) = directory.glob("cpu_speed_*.json")
    file.write_text(json.dumps({"fp32_gflops": speed.fp32_gflops, "bf16_gflops": speed.bf16_gflops}))


def test_bf16_without_its_units_is_found_out_in_an_instant() -> None:
    """Without oneDNN torch multiplies bf16 as on an old processor: really slow, not pretended."""
    threads = torch.get_num_threads()
    with torch.backends.mkldnn.flags(enabled=False):
        started = time.process_time()
        speed = measured()
        taken = time.process_time() - started
    assert speed.bf16_slowdown > 5 and taken < 1  # measured 40 and 0.08 s, of its own: the machine may be busy
    assert "engine.precision=fp32" in str(slow_bf16(speed)) and torch.get_num_threads() == threads


def test_a_fast_processor_is_not_spoken_of() -> None:
    assert slow_bf16(CpuSpeed(100.0, 200.0)) is None and slow_bf16(CpuSpeed(100.0, 60.0)) is None
    assert "13 times slower" in str(slow_bf16(SLOW))


def test_it_is_measured_once_per_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cpu_speed()
    monkeypatch.setattr(subject, "_product_sec", lambda dtype: pytest.fail("measured again"))
    assert cpu_speed() == first and len(list(cache.glob("cpu_speed_*.json"))) == 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"fp32_gflops": 1, "bf16_gflops": 0}', '{"fp32_gflops": NaN, "bf16_gflops": 1}', "[" * 900],
)
def test_a_damaged_memory_is_measured_anew(text: str, cache: Path) -> None:
    cpu_speed()
    (file,) = cache.glob("cpu_speed_*.json")
    file.write_text(text)
    assert cpu_speed().fp32_gflops > 0 and json.loads(file.read_text())["bf16_gflops"] > 0


def test_another_instruction_set_is_another_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONEDNN_MAX_CPU_ISA=AVX2 makes a slow processor of a fast one."""
    cpu_speed()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    cpu_speed()
    assert len(list(cache.glob("cpu_speed_*.json"))) == 2


def test_without_a_place_to_remember_it_is_measured_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cpu_speed().fp32_gflops > 0


@pytest.mark.slow
def test_a_start_in_slow_bf16_says_so_and_so_does_the_report(
    settings: Any, tmp_path: Path, cache: Path, capfd: Any
) -> None:
    """A resume that forgot the precision went on in bf16 for 13 times as long, without a word."""
    remember(SLOW)
    zero = ("engine=zero1", "engine.name=deepspeed")
    assert run_alone(settings("train.max_steps=1", *zero, "engine.precision=fp32")) == EXIT_DONE
    said = capfd.readouterr().out
    assert "times slower" not in said
    assert (
        "CPU with 1 thread, fp32, DeepSpeed ZeRO-1, 0.0 M parameters; fused attention, compiled: none (auto: " in said
    )
    assert "gains little); expected: roughly" in said
    assert run_alone(settings("train.max_steps=2", *zero, "engine.precision=bf16")) == EXIT_DONE
    said = capfd.readouterr().out
    assert "warning: this processor multiplies matrices 13 times slower in bf16" in said
    assert "note: engine.precision is bf16; until here the run was in fp32" in said
    page = write_report(tmp_path / "run").read_text()
    assert "13 times slower in bf16" in page


@pytest.mark.parametrize("more", [(), ("--recommend",)])
def test_the_planner_hints_at_fp32(
    more: tuple[str, ...], cache: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It planned 106 s a step where fp32 takes 2.3 s, and gave no hint."""
    monkeypatch.setattr("swinv2_train.planning.search.POLICIES", ("none",))
    remember(SLOW)
    shallow = ("model=demo", "model.depths=[1,1]", "model.num_heads=[2,4]", "model.pretrained_window_sizes=[0,0]")
    small = (*shallow, "task.mask_unit_px=8", "train.global_batch_size=4", "train.micro_batch_size=4")
    plan(*parse([*small, "hardware.device=cpu", "plan.num_gpus=1", "engine.precision=bf16", *more]))
    hint = capsys.readouterr().out.split("hint: ")[1]
    assert "13 times slower in bf16" in hint and " s a step" in hint
    plan(*parse([*small, "hardware.device=cpu", "plan.num_gpus=1", "engine.precision=fp32", *more]))
    assert "hint" not in capsys.readouterr().out
