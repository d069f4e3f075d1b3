"""scripts/first_contact.sh and what packs for it: it runs to its end without a card, and a set of wheels is closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.trace_idle import busy_us, summary
from scripts import first_contact_lines, pack_first_contact, resume_check
from tests.support.shard_files import noise_shards

ROOT = Path(__file__).resolve().parents[3]


def run_part(part: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, dict]]:
    """The script as on a machine with a card: no home, no proxy to a network, and its own folders alone."""
    noise_shards(folder / "pack" / "shards")
    environment = {"PATH": os.environ["PATH"], "HOME": "/proc/nowhere", "TMPDIR": str(folder), "PYTHON": sys.executable}
    environment |= {"OUT": str(folder / "out"), "PACK": str(folder / "pack")}
    command = ["bash", str(ROOT / "scripts" / "first_contact.sh"), part, "--cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=500, check=False
    )
    lines = (folder / "out" / f"part_{part}.jsonl").read_text().splitlines()
    return done, {line["item"]: line for line in map(json.loads, lines)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("a", {"environment", "kernels", "gpu_tests", "attention_4"}),
        ("b", {"speed", "layer_norm", "launch_overhead", "profile_zero3", "idle_zero3"}),
        ("c", {"memory", "training", "training_metrics", "resume", "planner"}),
    ],
)
def test_a_part_runs_to_its_end_without_a_card(part, expected, tmp_path):
    """Every item, its line, and the summary as the last that is printed; nothing is left beside the results."""
    (tmp_path / "pack" / "shards").mkdir(parents=True)
    done, lines = run_part(part, tmp_path)
    assert {name: line["state"] for name, line in lines.items()} == dict.fromkeys(expected, "ok"), done.stdout
    assert f"{len(expected)} items, 0 of them not ok" in done.stdout.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pack"]
    found = {name: line["records"] for name, line in lines.items()}
    if part == "a":
        assert found["kernels"][0]["good"] and found["environment"][0]["torch"]
    if part == "b":
        assert found["idle_zero3"][0]["busy_ms"] > 0 and lines["idle_zero3"]["tables"]
    if part == "c":
        assert found["resume"][0]["same"] and found["resume"][0]["steps_compared"] == 2
        assert found["training_metrics"][0]["steps"] == 3 and lines["planner"]["tables"]


def test_an_unknown_part_is_a_usage_error():
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "first_contact.sh"), "d"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "a|b|c" in done.stderr


def test_a_line_keeps_what_was_found_and_why_something_failed():
    log = 'noise\n{"good": true}\n{not json\n| a | b |\n|---|---|\n| 1 | 2 |\nboom\n'
    good, bad, slow, none = (
        first_contact_lines.record_of(log, "x", code, 3, "c") for code in ("0", "1", "124", "skipped")
    )
    assert good["state"] == "ok" and good["records"] == [{"good": True}] and good["tables"][2] == "| 1 | 2 |"
    assert bad["state"] == "failed" and bad["last_lines"].endswith("boom")
    assert (slow["state"], none["state"]) == ("timeout", "skipped")
    text = first_contact_lines.summary([good, bad, slow, none], 9)
    assert text.splitlines()[-1] == "4 items, 3 of them not ok, 9 s" and "boom" in text and "1 of 1 good" in text


def wheel(folder: Path, name: str, version: str, needs: tuple[str, ...] = (), tag: str = "py3-none-any") -> Path:
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as file:
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        file.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n\n")
    return path


def test_a_set_of_wheels_that_is_not_closed_is_told(tmp_path):
    """Requirements of wheels and of this project; extras and other Pythons' do not count."""
    own = ("deepspeed==0.19.8", "fairscale==0.4.13", "hydra_core==1.3.8", "omegaconf==2.3.1", "webdataset==1.0.2")
    own = (*own, "braceexpand==0.1.7", "simplejpeg==1.9.0")
    wheels = [wheel(tmp_path, *each.split("==")) for each in own]
    assert pack_first_contact.open_requirements(wheels, "3.12") == []
    fine = ("numpy", "gone; extra == 'x'", "old; python_version < '3'", "omegaconf>=2")
    assert pack_first_contact.open_requirements([*wheels, wheel(tmp_path, "a", "1", fine)], "3.12") == []
    problems = pack_first_contact.open_requirements(
        [
            *wheels[1:],
            wheel(tmp_path, "b", "1", ("missing>=2", "omegaconf>=3")),
            wheel(tmp_path, "c", "1", tag="cp311-cp311-linux_x86_64"),
            wheel(tmp_path, "torch", "2.11"),
        ],
        "3.12",
    )
    expected = ("needs missing>=2", "needs omegaconf>=3", "not for Python 3.12", "must not be taken", "needs deepspeed")
    assert len(problems) == len(expected)
    assert all(any(part in problem for problem in problems) for part in expected), problems


def test_idle_is_what_no_stream_covers():
    assert busy_us([(0, 10), (5, 20), (30, 40), (32, 35), (36, 38)]) == 30
    events = [{"ph": "X", "cat": "kernel", "name": "k", "ts": ts, "dur": dur} for ts, dur in ((0, 25), (75, 25))]
    found, calls = summary([*events, {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 500}])
    assert found["idle_share"] == 0.5 and found["launches"] == 2 and calls == {"k": [25, 25]}
    with pytest.raises(ValueError, match="neither kernels nor operations"):
        summary([])


def test_runs_that_differ_are_told_by_step_and_file():
    run = {"losses": {1: 0.5, 2: 0.25}, "files": {"a": "1", "b": "2"}, "checkpoint": "step_00000002"}
    assert resume_check.differences(run, run)["same"]
    later = resume_check.differences(run, run | {"losses": {1: 0.5, 2: 0.26}, "files": {"a": "1", "b": "3"}})
    assert later == {"same": False, "first_step": 2, "files": ["b"]}
    assert not resume_check.differences(run, run | {"losses": {1: 0.5}})["same"]
