"""scripts/proof.py: a fair comparison, the labelled images of a seed, what runs when, what the table says."""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path

import pytest

from scripts import proof
from scripts.proof import ARMS, PRETRAINED, PROBES, SCRATCH, SEEDS, STEPS, Cell, Job
from swinv2_train.config.exit_codes import EXIT_FAILED
from swinv2_train.data.packing import Entry, pack
from swinv2_train.data.shards.tar_reader import TarReader, open_manifest
from tests.support.configs import composed
from tests.support.images import image_bytes


def flat(config: object, prefix: str = "") -> dict[str, object]:
    """Every dotted key of a configuration."""
    found: dict[str, object] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= flat(value, f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = value
    return found


def test_the_two_arms_differ_in_nothing_but_the_weights_they_start_from(tmp_path):
    """Same steps, images, learning rate, augmentation, seed: otherwise the table would compare something else."""
    jobs = proof.jobs(tmp_path)
    assert len({job.name for job in jobs.values()}) == len(jobs) == len(SEEDS) * (4 + 2 * len(STEPS))
    seed = SEEDS[1]  # composing takes a while; the seeds' commands differ in nothing but the seed
    encoder = composed(list(jobs[PRETRAINED, 0, seed].command[1:]))
    assert encoder.data.shards == "data/cifar10/train-*.tar" and encoder.seed == seed
    for percent, steps in STEPS.items():
        scratch, pretrained = (
            flat(composed(list(jobs[arm, percent, seed].command[1:]))) for arm in (SCRATCH, PRETRAINED)
        )
        assert {key for key in scratch if scratch[key] != pretrained[key]} == {"run_dir", "task.init_from"}
        assert (scratch["task.init_from"], pretrained["task.init_from"]) == (None, encoder.run_dir)
        assert (scratch["seed"], scratch["train.max_steps"]) == (seed, steps)
        assert scratch["data.shards"] == f"{proof.subset_prefix(tmp_path, percent, seed)}-*.tar"
        assert scratch["data.eval_shards"] == "data/cifar10/test-*.tar"


def test_a_share_of_the_labels_holds_as_many_of_each_class_and_grows_by_inclusion(tmp_path, monkeypatch):
    """1 % of a seed are among its 10 %; another seed has others; every image keeps its label and its bytes."""
    monkeypatch.setattr(proof, "DATA", tmp_path / "all")
    entries = [Entry(f"k{n:03d}", "png", n % 4, lambda n=n: image_bytes(n)) for n in range(400)]
    pack(entries, str(tmp_path / "all" / "train"), samples_per_shard=150, seed=0)

    def keys(percent: int, seed: int) -> dict[str, int]:
        proof.pack_subset(tmp_path, percent, seed)
        manifest = open_manifest(f"{proof.subset_prefix(tmp_path, percent, seed)}-*.tar", "data.shards")
        reader = TarReader(manifest, max_open=1)
        found = [reader.read(shard, index) for shard, count in enumerate(manifest.counts) for index in range(count)]
        for sample in found:
            assert sample.targets.get("label") == int(sample.key[1:]) % 4 and sample.image == image_bytes(
                int(sample.key[1:])
            )
        return {sample.key: sample.targets.get("label") for sample in found}

    one, ten, other = keys(1, 0), keys(10, 0), keys(10, 1)
    assert sorted(one.values()) == [0, 1, 2, 3]
    assert sorted(ten.values()) == sorted(other.values()) == [label for label in range(4) for _ in range(10)]
    assert one.keys() < ten.keys() and ten.keys() != other.keys()
    assert keys(10, 0) == ten


def stand_in(path: Path, seconds: float, code: int = 0, needs: Path | None = None) -> Job:
    """A program in a run's place: it notes when it began and ended, and leaves what a complete run leaves."""
    path.with_suffix(".py").write_text(
        f"import json, pathlib, sys, time\nrun = pathlib.Path({str(path)!r}); run.mkdir()\nbegan = time.time()\n"
        f"time.sleep({seconds})\nif {code}: sys.exit({code})\n"
        "line = {'step': 1, 'images_seen': 1, 'val/loss': 1.0, 'began': began, 'ended': time.time()}\n"
        "(run / 'metrics.jsonl').write_text(json.dumps(line) + '\\n'); (run / 'report.html').touch()\n"
    )
    return Job(path, (), path / "metrics.jsonl", needs)


@pytest.fixture
def scripts(monkeypatch):
    """Jobs start the program beside their run directory, not a training."""
    import subprocess
    import sys

    def start(job: Job) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(job.name.with_suffix(".py"))])

    monkeypatch.setattr(proof, "_start", start)


@pytest.mark.slow
def test_a_run_waits_for_the_one_it_starts_from_and_what_is_complete_is_not_run_again(tmp_path, scripts):
    first = stand_in(tmp_path / "first", 0.5)
    after = stand_in(tmp_path / "after", 0.0, needs=first.name)
    beside = stand_in(tmp_path / "beside", 0.1)
    assert proof.run_all([first, after, beside])
    assert after.final["began"] >= first.final["ended"] and beside.final["began"] < first.final["ended"]
    times = after.final
    started = time.process_time()
    assert proof.run_all([first, after, beside]) and after.final == times
    assert time.process_time() - started < 0.4


@pytest.mark.slow
def test_a_run_that_fails_ends_the_proof_and_is_named(tmp_path, scripts, capsys):
    """What needs it is never started; what runs beside it may end."""
    failing = stand_in(tmp_path / "failing", 0.0, code=1)
    after = stand_in(tmp_path / "after", 0.0, needs=failing.name)
    beside = stand_in(tmp_path / "beside", 1.0)
    assert not proof.run_all([failing, beside, after])
    assert "failing ended with 1; see" in capsys.readouterr().out
    assert after.final is None and not after.name.exists() and beside.final is not None


def test_sigterm_is_a_ctrl_c_also_where_a_shell_has_its_background_jobs_ignore_that(tmp_path):
    """Otherwise `make proof &` in a script could only be killed, and its runs would go on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert proof.main(["--runs", str(tmp_path), "--table"]) == EXIT_FAILED
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("scratch", "pretrained", "says"),
    [
        ((50.0, 51.0, 52.0), (54.0, 55.0, 56.0), "pre-training wins"),
        ((54.0, 55.0, 56.0), (50.0, 51.0, 52.0), "pre-training loses"),
        ((50.0, 51.0, 52.0), (50.5, 51.5, 52.5), "no difference beyond the spread"),
        ((50.0, 50.0, 50.0), (49.0, 51.0, 53.0), "no difference beyond the spread"),
    ],
)
def test_the_verdict_needs_a_difference_beyond_the_larger_spread(scratch, pretrained, says):
    assert proof.verdict(Cell(scratch), Cell(pretrained)) == says


def test_the_table_shows_mean_spread_and_each_seeds_gain():
    found = {(arm, what): Cell((50.0, 51.0, 52.0)) for arm in ARMS for what in (*STEPS, *PROBES)}
    found[PRETRAINED, 10] = Cell((54.0, 57.0, 60.0))
    rows = list(proof.table(found))
    assert "51.00 ± 1.00 | 57.00 ± 3.00 | +6.00 | +4.00, +6.00, +8.00 | pre-training wins |" in rows[3]
    assert len(rows) == 2 + len(STEPS) + len(PROBES)


def test_the_picture_is_drawn(tmp_path):
    from PIL import Image

    found = {(arm, what): Cell((50.0, 51.0, 52.0)) for arm in ARMS for what in (*STEPS, *PROBES)}
    proof.draw(found, tmp_path / "proof.png")
    with Image.open(tmp_path / "proof.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
