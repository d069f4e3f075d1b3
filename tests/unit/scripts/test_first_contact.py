"""scripts/first_contact.sh and what packs for it: it runs to its end without a card, and a set of wheels is closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks.trace_idle import busy_us, summary
from scripts import first_contact_lines, first_contact_wheels, pack_first_contact, resume_check
from scripts.first_contact_wheels import NEEDS
from tests.support.shard_files import noise_shards

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "first_contact.sh"


def run_part(part: str, folder: Path, python: str) -> tuple[subprocess.CompletedProcess[str], dict[str, dict]]:
    """The script as on a machine with a card: no home, no proxy to a network, and its own folders alone."""
    noise_shards(folder / "pack" / "shards")
    (folder / "pack" / "wheels").mkdir()
    (folder / "pack" / "wheels" / NEEDS).write_text(f"numpy=={metadata.version('numpy')}\n")
    environment = {"PATH": os.environ["PATH"], "HOME": "/proc/nowhere", "TMPDIR": str(folder), "PYTHON": python}
    environment |= {"OUT": str(folder / "out"), "PACK": str(folder / "pack")}
    command = ["bash", str(SCRIPT), part, "--cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=500, check=False
    )
    lines = (folder / "out" / f"part_{part}.jsonl").read_text().splitlines()
    return done, {line["item"]: line for line in map(json.loads, lines)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("a", ["wheels", "environment", "kernels", "gpu_tests", "attention_4"]),
        ("b", ["wheels", "speed", "layer_norm", "launch_overhead", "profile_zero3", "idle_zero3", "trace_zero3"]),
        ("c", ["wheels", "memory", "training", "training_metrics", "resume", "resume_deterministic", "planner"]),
    ],
)
def test_a_part_runs_to_its_end_without_a_card(part, expected, tmp_path, python):
    """Every item, its line, and the summary as the last that is printed; nothing is left beside the results.

    Part a starts real interpreters, with no home; those of b and c come warm.
    """
    (tmp_path / "pack" / "shards").mkdir(parents=True)
    done, lines = run_part(part, tmp_path, sys.executable if part == "a" else python)
    assert [(name, line["state"]) for name, line in lines.items()] == [(name, "ok") for name in expected], done.stdout
    assert f"{len(expected)} items, 0 of them not ok" in done.stdout.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pack"]
    found = {name: line["records"] for name, line in lines.items()}
    assert found["wheels"][0] | {"kept": None} == {
        "good": True, "problems": [], "kept": None, "as_pinned": 1, "installed": {},
    }  # fmt: skip
    if part == "a":
        assert found["kernels"][0]["good"] and found["environment"][0]["torch"]
    if part == "b":
        assert found["idle_zero3"][0]["busy_ms"] > 0 and lines["idle_zero3"]["tables"]
        assert (tmp_path / "out" / "trace_zero3.json.gz").stat().st_size > 1000
    if part == "c":
        for name in ("resume", "resume_deterministic"):
            assert found[name][0]["same"] and found[name][0]["steps_compared"] == 2
        assert found["training_metrics"][0]["steps"] == 3 and lines["planner"]["tables"]


@pytest.mark.parametrize("part", ["a", "b", "c"])
def test_the_items_of_a_part_have_nine_minutes_among_them(part):
    """Each may take its seconds and what was saved before it, so this is when the last ends, whatever happens."""
    done = subprocess.run(["bash", str(SCRIPT), part, "--plan"], capture_output=True, text=True, check=True)
    names, seconds = zip(*(line.rsplit(maxsplit=1) for line in done.stdout.splitlines()), strict=True)
    assert sum(map(int, seconds)) <= 530 and len(set(names)) == len(names) >= 9


@pytest.mark.slow
def test_an_item_that_hangs_ends_in_time_with_all_that_it_started(tmp_path):
    """One that does not listen to SIGTERM, whose child is in a session of its own and does not either."""
    pid = tmp_path / "pid"
    orphan = f"trap '' TERM; echo $$ > {pid}; while :; do sleep 1; done"
    (tmp_path / "orphan.sh").write_text(orphan)
    hangs = ["bash", "-c", f"trap '' TERM; setsid bash {tmp_path / 'orphan.sh'} & echo begun; wait; wait"]
    command = [sys.executable, str(SCRIPT.with_name("first_contact_lines.py")), "item", str(tmp_path / "lines")]
    subprocess.run([*command, str(tmp_path / "log"), "hangs", "3", *hangs], check=True, timeout=240)  # it has 3 s
    assert not Path(f"/proc/{int(pid.read_text())}").exists()
    for name, what in {"good": "exit 0", "bad": "exit 3"}.items():
        subprocess.run([*command, str(tmp_path / "log"), name, "5", "bash", "-c", what], check=True)
    subprocess.run([*command, str(tmp_path / "log"), "late", "2", "bash", "-c", "exit 0"], check=True)
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    states = [(line["item"], line["state"], line["exit_code"]) for line in lines]
    assert states == [("hangs", "timeout", None), ("good", "ok", 0), ("bad", "failed", 3), ("late", "skipped", None)]
    assert lines[0]["last_lines"] == "begun"


def test_an_unknown_part_is_a_usage_error():
    done = subprocess.run(["bash", str(SCRIPT), "d"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "a|b|c" in done.stderr


def test_a_line_keeps_what_was_found_and_why_something_failed():
    log = 'noise\n{"good": true, "a": 1}\n{not json\n{"good": false, "b": [2]}\n| a | b |\n|---|---|\n| 1 | 2 |\nboom\n'
    good, bad, slow, none = (
        first_contact_lines.record_of(log, "x", state, code, 3, "c")
        for state, code in (("ok", 0), ("failed", 1), ("timeout", None), ("skipped", None))
    )
    assert good["records"] == [{"good": True, "a": 1}, {"good": False, "b": [2]}]
    assert good["tables"][2] == "| 1 | 2 |" and bad["last_lines"].endswith("boom")
    text = first_contact_lines.summary([good, bad, slow, none], 9)
    assert text.splitlines()[-1] == "4 items, 3 of them not ok, 9 s"
    assert "| x | failed | 3 | boom; 1 of 2 good; 2 records, below; 1 rows, below |" in text
    assert "| good | a | b |\n| --- | --- | --- |\n| true | 1 |  |\n| false |  | [2] |" in text  # every record


def wheel(folder: Path, name: str, version: str, needs: tuple[str, ...] = (), tag: str = "py3-none-any") -> Path:
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as file:
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        about = f"{name}-{version}.dist-info"
        file.writestr(f"{about}/METADATA", "\n".join(["Metadata-Version: 2.1", *lines]) + "\n\n")
        file.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{about}/RECORD", "")
    return path


def pure_wheels(folder: Path) -> list[Path]:
    """Of all that this project requires but what a machine with a card has, in the pinned versions."""
    own = [each.name for each in pack_first_contact.own_requirements() if each.name not in pack_first_contact.PRESENT]
    return [wheel(folder, *pack_first_contact.pinned(name).replace("-", "_").split("==")) for name in own]


def test_a_set_of_wheels_that_is_not_closed_is_told(tmp_path):
    """Requirements of wheels and of this project, by name and version; extras and other Pythons' do not count."""
    wheels = pure_wheels(tmp_path)
    assert pack_first_contact.open_requirements(wheels, "3.12") == []
    fine = ("numpy", "torch>=2.10", "gone; extra == 'x'", "old; python_version < '3'", "omegaconf>=2")
    fine_wheels = [wheel(tmp_path, "a", "1", fine), wheel(tmp_path, "d", "1", tag="cp38-abi3-manylinux2014_x86_64")]
    assert pack_first_contact.open_requirements([*wheels, *fine_wheels], "3.12") == []
    problems = pack_first_contact.open_requirements(
        [
            *(each for each in wheels if not each.name.startswith("deepspeed")),
            wheel(tmp_path, "b", "1", ("missing>=2", "omegaconf>=3", "triton>=3.7")),
            wheel(tmp_path, "c", "1", tag="cp311-cp311-manylinux2014_x86_64"),
            wheel(tmp_path, "torch", "2.11"),
        ],
        "3.12",
    )
    expected = ("needs missing>=2", "needs omegaconf>=3", "not for Python 3.12", "must not be taken", "needs deepspeed")
    expected = (*expected, "needs triton>=3.7, the machine may have 3.6")
    assert len(problems) == len(expected)
    assert all(any(part in problem for problem in problems) for part in expected), problems


def test_what_is_pinned_is_all_that_is_needed():
    """Names of the closure that nobody wrote down, pytest's among them; nothing of what is compiled for CUDA."""
    names = pack_first_contact.needs("3.12")
    assert {"numpy", "antlr4-python3-runtime", "pydantic-core", "execnet", "deepspeed"} <= set(names)
    assert not {"wandb", "torch", "torchvision", "triton"} & set(names) and all(map(pack_first_contact.pinned, names))


def test_what_is_missing_or_of_another_version_is_installed_beside_the_machines_own(tmp_path, monkeypatch):
    """torch stays, whatever a wheel says; a wheel of another Python is told, and the others are installed."""
    for name, version in (("thing_one", "1.0"), ("thing_two", "2.0"), ("torch", "9")):
        wheel(tmp_path, name, version)
    wheel(tmp_path, "other", "1", tag="cp27-cp27m-manylinux2014_x86_64")
    numpy = metadata.version("numpy")
    (tmp_path / NEEDS).write_text(f"thing-one==1.0\nThing.Two==2.0\nnumpy=={numpy}\npip==0.1\nother==1\n")
    site = tmp_path / "site"
    found = first_contact_wheels.install(tmp_path, site)
    assert sorted(path.stem for path in site.glob("*.dist-info")) == ["thing_one-1.0", "thing_two-2.0"]
    assert found["installed"] == {"thing-one": [None, "1.0"], "Thing.Two": [None, "2.0"]} and found["as_pinned"] == 1
    assert found["kept"]["torch"] == metadata.version("torch") and not found["good"]
    assert [problem.split()[0] for problem in found["problems"]] == ["pip", "other"]
    versions = {"torch": "2.10.0+cu128", "torchvision": "0.30"}
    monkeypatch.setattr(first_contact_wheels, "version_here", lambda name: versions.get(name, "1"))
    (tmp_path / NEEDS).write_text("")
    [problem] = first_contact_wheels.install(tmp_path, site)["problems"]
    assert problem == "torch is 2.10.0+cu128, setup.cfg wants >=2.11,<3; it is not replaced"


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
