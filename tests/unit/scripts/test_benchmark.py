"""scripts/benchmark.py: everyone computes the same model, ratios are the right way round, nothing is left behind."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmark import absent, too_large
from scripts.benchmark_tables import BOTH, LAPS, Entry, Table, details, summary
from scripts.benchmark_worker import Refused, Setting, Training, write_inputs
from scripts.contestants import PEERS, PRODUCTS, Case, Contestant
from scripts.matrix_products import MatrixProducts
from scripts.official_arithmetic import OfficialArithmetic
from swinv2_train.models.attention import BIAS_HIDDEN

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "benchmark.py"
SHIFTED = Case("demo", 64, 4, 2)  # maps of 16 and 8
CLAMPED = Case("demo", 32, 8, 2)  # maps of 8 and 4


@pytest.fixture(scope="module", params=[SHIFTED, CLAMPED], ids=lambda case: case.name)
def setting(request, tmp_path_factory):
    made = Setting(request.param, tmp_path_factory.mktemp("benchmark"), torch.device("cpu"), torch.get_num_threads())
    write_inputs(made)
    return made


@pytest.mark.parametrize("implementation", ["ours", *PEERS])
def test_everyone_has_the_same_weights_and_computes_the_same(setting, implementation):
    """With one parameter changed it would not."""
    training = Training(Contestant(implementation, "fp32"), setting)
    assert training.difference() < 1e-5  # measured worst 1.2e-6; BOUNDS is for models of 24 blocks
    with torch.no_grad():
        next(p for name, p in training.module.named_parameters() if "logit_scale" in name).add_(0.1)
    with pytest.raises(Refused, match="differ by .* from the official arithmetic's"):
        training.difference()


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_bf16_is_within_its_bound_and_ours_keeps_masters(setting, precision):
    """Steps of 1e-5 are too small for bf16 weights, so without masters most of them would be lost."""
    training = Training(Contestant("ours", precision), setting)
    assert 1e-3 < training.difference() < 0.1
    before = [parameter.detach().clone() for parameter in training.module.parameters()]
    result = training.turn(2)  # and one that is not measured
    walls = [step["wall"] for step in result["steps"]]
    assert len(walls) == 2 and all(0 < wall[LAPS[0]] < wall[LAPS[1]] < wall[LAPS[2]] for wall in walls)
    weights = training.weights_gib()
    assert result["peak_gib"] >= weights  # of a process, which may have room from before
    assert all(parameter.grad is None for parameter in training.module.parameters())
    changed = [not torch.equal(a, b) for a, b in zip(before, training.module.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2


@pytest.mark.parametrize("case", [SHIFTED, CLAMPED], ids=lambda case: case.name)
def test_the_limit_has_all_matrix_products_of_a_step(case):
    """Counted by torch in the official arithmetic; the position bias's MLP is left out of the limit."""
    official = OfficialArithmetic(case.model())
    with FlopCounterMode(display=False) as expected:
        official(torch.randn(case.batch_size, 3, case.img_size, case.img_size)).sum().backward()
    products = MatrixProducts(case.meta_model(), case.batch_size, torch.float32, torch.device("cpu"))
    with FlopCounterMode(display=False) as found:
        products.forward()
        products.backward()
    bias_mlp = 0
    for grid, depth, heads in zip(official.model.grids, official.model.depths, official.model.num_heads, strict=True):
        offsets = math.prod(2 * side - 1 for side in grid.window)
        first, second = 2 * offsets * 2 * BIAS_HIDDEN, 2 * offsets * BIAS_HIDDEN * heads
        bias_mlp += depth * (2 * first + 3 * second)  # the offsets need no gradient
    assert found.get_total_flops() == expected.get_total_flops() - bias_mlp


def entry(name: str, precision: str, *seconds: float, **changes) -> Entry:
    made = Entry(Contestant(name, precision, **changes), difference=0.0)
    for value in seconds:
        made.add({"steps": [{clock: dict.fromkeys(LAPS, value) for clock in ("wall", "cpu")}], "peak_gib": value})
    return made


def test_ratios_are_times_the_speed_and_of_the_same_round():
    slow_then_noisy, ours = entry("official", "bf16", 2, 2, 80), entry("ours", "bf16", 1, 1, 20)
    assert ours.times_speed_of(slow_then_noisy, BOTH) == 2
    assert ours.peak_gib == 20


def test_ours_is_compared_with_the_faster_of_autocast_and_bf16_weights():
    table = Table(SHIFTED, "bf16")
    table.entries = [
        entry("ours", "bf16", 1), entry("ours", "bf16", 0.5, compiled=True), entry("official", "bf16", 9),
        entry("official", "autocast", 4), entry("official", "autocast", 1, tuned=True), entry("timm", "bf16", 2),
        entry("timm", "autocast", 3), entry("timm", "bf16", 1.5, compiled=True), entry(PRODUCTS, "bf16", 0.25),
    ]  # fmt: skip
    plain, compiled = summary([table]).splitlines()[2:]
    assert plain.endswith("| ours |" + 4 * " 4.00 |" + 4 * " 2.00 |" + " timm, bf16 | 16.00 |")
    assert compiled.endswith("|" + 4 * " 8.00 |" + 4 * " 3.00 |" + " timm, compiled, bf16 | 16.00 |")
    table.entries.append(Entry(Contestant("torchvision", "bf16"), failed="torchvision is not installed"))
    rows = details(table).splitlines()
    assert "| torchvision | bf16 | left out: torchvision is not installed |" in rows[-1]
    assert {row.count("|") for row in rows[2:]} == {17}


@pytest.mark.slow  # the peers' giant is built to see what they make of it
def test_a_model_is_refused_where_it_does_not_fit_or_cannot_be_expressed():
    """Giant is refused before anything is allocated."""
    giant, device = Case("giant", 192, 12, 1), torch.device("cpu")
    rows = [Contestant(name, "fp32") for name in ("ours", "official")]
    assert too_large(SHIFTED, rows, device) is None
    assert "GiB" in too_large(giant, 1000 * rows, device)
    for peer in PEERS:
        assert absent(Contestant(peer, "fp32"), giant) is not None
    assert absent(rows[0], giant) is None


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [each for child in children for each in descendants(child)]


def test_a_whole_run_writes_its_tables(tmp_path):
    out = tmp_path / "speed.md"
    command = [sys.executable, str(SCRIPT), "--quick", "--cases", "demo/32/4", "--rounds", "2", "--threads", "1"]
    command += ["--only", "ours", "official", "torchvision", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text, results = out.read_text(), json.loads(out.with_suffix(".json").read_text())
    assert all(len(line) <= 160 for line in text.splitlines() if line[:1] not in ("|", " "))
    assert "| demo/32/4 | fp32 | ours |" in text and "--only ours official torchvision" in text
    assert torch.__version__.startswith(results["versions"]["torch"])  # a wheel may leave its build out
    (table,) = results["tables"]
    ours, official, torchvision = table["entries"][:3]
    assert len(ours["rounds"]) == len(official["rounds"]) == 2 and official["difference"] == 0
    assert torchvision["failed"] is None and len(torchvision["rounds"]) == 2 and torchvision["difference"] < 1e-5
    assert table["idle_cpu_sec"] < 0.1 * table["turns_sec"] + 0.1  # those who wait use no CPU


def test_an_interrupt_ends_the_workers(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--cases", "demo/32/4", "--rounds", "1000", "--threads", "1"]
    command += ["--only", "ours"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "ready" in process.stdout.readline()
    workers = descendants(process.pid)
    assert len(workers) >= 3  # multiprocessing's tracker and server, and what the server has forked
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    deadline = time.monotonic() + 30  # multiprocessing's own tracker ends when it notices that all others have
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.1)
