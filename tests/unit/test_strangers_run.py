"""A run directory that somebody gave away: each file that is read back is checked, and refused in one message."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from swinv2_train.checkpoint import find_checkpoint
from swinv2_train.checkpoint.saved_state import read_state
from swinv2_train.config import ConfigError
from swinv2_train.monitoring.run_log import MOST_NAMES, read_metrics
from swinv2_train.monitoring.signs import read_ranks
from swinv2_train.monitoring.step_records import StepRecord
from swinv2_train.report.page import write_report
from swinv2_train.runtime import read_environment
from swinv2_train.status import read_status, status_text
from swinv2_train.weights import read_weights

pytestmark = pytest.mark.slow

OLD_RUN = Path(__file__).parents[1] / "golden" / "old_run" / "run"
CHECKPOINT = Path("checkpoints", "step_00000002")

HOSTILE = (
    "", "[]", "null", "{", "[" * 10**5, '{"a": ' * 10**4, "1e999", '"' + "x" * 10**6 + '"', "{}", "\x00",
    '{"step": 1e99, "world_size": -1, "files": {}, "tensors": {}}',
    '{"step": 2, "world_size": 1000000000000, "files": {"../../../../etc/passwd": {"bytes": 5}}, "tensors": {}}',
    '{"step": 2, "world_size": 2, "files": 5, "tensors": {"norm.weight": [[4611686018427387904], "F32", true]}}',
    '{"step": 2, "world_size": 2, "files": {"a": 5}, "tensors": {"norm.weight": [[8], "pickle", true]}}',
    '[{"gpus": 5, "versions": [1]}]', '[5]', '{"step": [], "host": {}}',
)  # fmt: skip


def read_all(run_dir: Path) -> None:
    """What evaluate, export and task.init_from read of a run, every tensor of it included."""
    read_state(find_checkpoint(run_dir))
    weights = read_weights(run_dir)
    for name in weights:
        weights[name]


READERS: dict[str, tuple[Path, Callable[[Path], object]]] = {
    "COMPLETE": (CHECKPOINT / "COMPLETE", read_all),
    "state.json": (CHECKPOINT / "state.json", lambda run_dir: read_state(run_dir / CHECKPOINT)),
    "engine.json": (CHECKPOINT / "engine" / "engine.json", lambda run_dir: read_weights(run_dir)),
    "status.json": (Path("status.json"), lambda run_dir: status_text(read_status(run_dir))),
    "a sign of life": (Path("health", "rank_00000.json"), read_ranks),
    "environment.json": (Path("environment.json"), lambda run_dir: [read_environment(run_dir), write_report(run_dir)]),
    "metrics.jsonl": (Path("metrics.jsonl"), lambda run_dir: [read_metrics(run_dir), write_report(run_dir)]),
    "config.yaml": (Path("config.yaml"), write_report),
}


def old_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD_RUN, tmp_path / "run"))


def test_a_run_of_the_first_version_is_read(tmp_path):
    """The checks refuse nothing that was ever written."""
    run_dir = old_run(tmp_path)
    read_all(run_dir)
    assert len(read_environment(run_dir)) >= 1 and read_metrics(run_dir)[-1]["step"] >= 2
    assert "SwinV2 demo" in write_report(run_dir).read_text()


@pytest.mark.parametrize("file", READERS)
def test_a_hostile_file_of_a_run_gives_one_message(tmp_path, file):
    """Or is passed over, where the file is a record of no consequence; never a traceback, never a long wait."""
    run_dir = old_run(tmp_path)
    place, read = READERS[file]
    path = run_dir / place
    path.parent.mkdir(exist_ok=True)
    for content in HOSTILE:
        path.write_text(content)
        started = time.process_time()
        try:
            read(run_dir)
        except ConfigError as error:
            assert len(str(error)) < 6100 and str(error).isprintable(), error
        assert time.process_time() - started < 5, content[:80]
    path.unlink()
    os.mkfifo(path)
    try:
        read(run_dir)
    except ConfigError as error:
        assert str(path) in str(error)


def test_a_page_of_a_hostile_run_is_a_page(tmp_path):
    """Names of metrics, of pictures, of the machine, and the configuration come from files."""
    run_dir = old_run(tmp_path)
    bad = "<script>alert(1)</script>\x1b[2J\u202e"
    lines = [{"step": 1, "train/loss": 1.0, bad: 2.0, "perf/step_sec": 10**300, "nested": {bad: 1}, "x" * 10**5: 1}]
    lines += [{"step": "2"}, {"step": 10**30}, {"step": True}, {"step": 2, "train/loss": float("nan")}]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n" + "y" * 10**6 + "\n")
    (run_dir / "environment.json").write_text(json.dumps([{"hostname": bad, "gpus": [{"name": bad}], bad: bad}]))
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("name: demo", 'name: "<script>alert(1)</script>\\u202e"'))
    secret = tmp_path / "secret"
    secret.write_bytes(b"\x89PNG\r\n\x1a\nsecret of mine")
    (run_dir / "pictures").mkdir(exist_ok=True)
    (run_dir / "pictures" / "linked_00000001.png").symlink_to(secret)
    (run_dir / "pictures" / "torn_00000001.png").write_bytes(b"no picture")
    (run_dir / "pictures" / f"{bad.replace('/', '')}_1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    os.mkfifo(run_dir / "pictures" / "fifo_00000001.png")
    page = write_report(run_dir).read_text()
    assert "<script>alert" not in page and "\x1b" not in page and "\u202e" not in page
    assert "c2VjcmV0IG9m" not in page and "linked" not in page  # base64 of the secret
    assert "torn_00000001.png cannot be shown" in page
    assert len(page) < 500_000


def test_a_page_is_made_of_no_endless_file(tmp_path):
    run_dir = old_run(tmp_path)
    (run_dir / "metrics.jsonl").write_text(
        json.dumps({"step": 1, **{f"m{i}": i for i in range(MOST_NAMES + 1)}}) + "\n"
    )
    with pytest.raises(ConfigError, match="more than 500 metrics"):
        read_metrics(run_dir)
    with (run_dir / "metrics.jsonl").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match="more than 268,435,456 bytes"):
        read_metrics(run_dir)


def test_a_torn_record_of_samples_ends_no_resume(tmp_path):
    """It was read whole, and a line that is none of ours ended the run with a traceback."""
    folder = tmp_path / "sample_keys"
    folder.mkdir()
    good = json.dumps({"step": 1, "keys": ["a"]}) + "\n"
    path = folder / "rank_00000.jsonl"
    path.write_text(
        good + "[]\n{}\nnull\n{" + '\n{"step": "x"}\n' + json.dumps({"step": 9, "keys": []}) + "\n" + "torn"
    )
    StepRecord(folder, 0, 1, last_step=5).close()
    assert path.read_text() == good


def test_words_of_a_status_act_on_no_terminal(tmp_path):
    """swinv2-status shows what a file says; so it could clear the screen, or forge a second line."""
    sign = {
        "host": "h\x1b[2J", "pid": 1, "state": "failed", "reason": "ShardError: \x1b]0;owned\x07" + "y" * 10**5,
        "doing": "x\nrank 9: all is well", "doing_since": 1.0, "step": 1, "updated_at": 2.0,
    }  # fmt: skip
    (tmp_path / "status.json").write_text(json.dumps(sign | {"world_size": 2, "heartbeat_sec": 10.0}))
    (tmp_path / "health").mkdir()
    rank = {"rank": 1, "moves": 1, "place": None, "state": "running"}
    (tmp_path / "health" / "rank_00001.json").write_text(json.dumps(sign | rank))
    text = status_text(read_status(tmp_path))
    assert "\x1b" not in text and "\\x1b]0;owned\\x07" in text and "\nrank 9" not in text
    assert len(text) < 10_000
