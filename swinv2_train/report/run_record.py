"""What a run directory tells about its run, read as far as it goes, and how the run stands."""

from __future__ import annotations

import functools
import math
import os
import re
import socket
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from swinv2_train.config import ConfigError
from swinv2_train.config.saved import CONFIG_NAME, parse_saved_config, read_config_text
from swinv2_train.config.secret_texts import public, without_secrets
from swinv2_train.monitoring.run_log import read_metrics
from swinv2_train.monitoring.signs import MOST_SIGN_BYTES, SIGN_FIELDS, STATUS, process_ended
from swinv2_train.runtime import read_environment
from swinv2_train.storage.json_files import number, optional, read_json, record, whole

CURVES_PNG = "curves.png"
_STATUS = record({**SIGN_FIELDS, "heartbeat_sec": number(0)}, may={"total_steps": optional(whole())})


@dataclass(frozen=True)
class RunRecord:
    """What a run directory tells about its run.  Everything may be empty: a run can be read at any moment."""

    run_dir: Path
    config: Mapping[str, Any]
    config_text: str
    starts: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, Any]]
    pictures: Mapping[str, Sequence[tuple[int, Path]]]
    """Name -> (step, file) in order of steps."""
    status: Mapping[str, Any]
    """Of status.json: what the run does, or how it ended."""

    def value(self, *keys: str) -> Any:
        """A value of the configuration, None when it is not there."""
        node: Any = self.config
        for key in keys:
            node = node.get(key) if isinstance(node, Mapping) else None
        return node

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric; nan where it was written as null."""
        lines = [line for line in self.metrics if name in line and _is_number_or_null(line[name])]
        return [line["step"] for line in lines], [math.nan if line[name] is None else line[name] for line in lines]

    def latest(self, name: str) -> tuple[int, float] | None:
        """Step and value of the newest finite entry of a metric."""
        steps, values = self.curve(name)
        return next(((s, v) for s, v in zip(reversed(steps), reversed(values), strict=True) if math.isfinite(v)), None)


def read_run_record(run_dir: Path) -> RunRecord:
    """Read a run directory as far as it goes; what is missing stays empty."""
    config_path = run_dir / CONFIG_NAME
    text = read_config_text(config_path) if os.path.lexists(config_path) else ""
    config = _values(text, str(config_path))
    pictures: dict[str, list[tuple[int, Path]]] = {}
    folder = run_dir / "pictures"
    for path in sorted(folder.glob("*.png")) if not folder.is_symlink() else ():  # a link may lead to anybody's files
        found = re.fullmatch(r"(.{1,100})_([0-9]{1,18})", path.stem)
        if found and path.name != CURVES_PNG and stat.S_ISREG(path.lstat().st_mode):
            pictures.setdefault(found.group(1), []).append((int(found.group(2)), path))
    return RunRecord(
        run_dir=run_dir,
        config=config if isinstance(config, dict) else {},
        config_text=without_secrets(text),  # an older run's has them
        starts=public(read_environment(run_dir)),
        metrics=read_metrics(run_dir),
        pictures={name: sorted(files) for name, files in pictures.items()},
        status=_read_status(run_dir),
    )


@functools.lru_cache(maxsize=4)  # a run writes its page at the start and in the end
def _values(text: str, origin: str) -> Any:
    """Of a saved configuration, as plain mappings that nobody changes."""
    return OmegaConf.to_container(parse_saved_config(text, origin))


def _read_status(run_dir: Path) -> Mapping[str, Any]:
    try:
        status: Mapping[str, Any] = read_json(run_dir / STATUS, MOST_SIGN_BYTES, _STATUS)
    except (OSError, ConfigError):
        return {}
    return status


def find_parent(run: RunRecord) -> Path | None:
    """Directory of the run whose weights this one started from (task.init_from), when it is still there.

    init_from may name the run, one of its checkpoints or a file in it; a run that was moved is looked for beside
    this one.
    """
    init_from = run.value("task", "init_from")
    if not init_from:
        return None
    named = Path(str(init_from))
    beside = run.run_dir.resolve().parent
    for candidate in (named, *list(named.parents)[:3]):
        for path in (candidate, beside / candidate.name):
            is_run = any(os.path.exists(path / name) for name in ("metrics.jsonl", CONFIG_NAME))
            if candidate.name and is_run and path.resolve() != run.run_dir.resolve():
                return path
    return None


def state_of(run: RunRecord, total_steps: int | None) -> tuple[str, str]:
    """How a run stands, as a class of the page's looks and in words: running, stopped, failed, complete, ...

    total_steps: planned optimizer steps; None = those that status.json or train.max_steps say.
    """
    status, planned = run.status, run.value("train", "max_steps")
    known = (total_steps, status.get("total_steps"), planned)
    total = next((each for each in known if isinstance(each, int)), None)
    step = run.metrics[-1]["step"] if run.metrics else 0
    where = "before the first step" if not run.metrics else f"at step {step:,}" + (f" of {total:,}" if total else "")
    state = status.get("state")
    if state == "failed":
        return "failed", f"failed {where}"
    if state == "stopped":
        return "open", f"stopped {where}"
    if state == "running" and not (total and step >= total and _lost(status)):
        return ("failed", f"ended without a word {where}") if _lost(status) else ("open", f"running, {where}")
    if not run.metrics:
        return "idle", "no step logged yet"
    return ("done", f"complete: {step:,} steps") if total is not None and step >= total else ("open", where)


def _lost(status: Mapping[str, Any]) -> bool:
    """Whether what should be running is no more; on another host, whether it was not heard of for long."""
    if status["host"] == socket.gethostname():
        return process_ended(status["pid"])
    return bool(time.time() - status["updated_at"] > 6 * status["heartbeat_sec"] + 60)


def _is_number_or_null(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
