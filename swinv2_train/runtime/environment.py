"""The record of where a run was started: versions, commit, hardware, command.

torch is imported inside the functions, so that a wrong configuration is answered before that costs its seconds.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swinv2_train.config import ConfigError
from swinv2_train.config.secret_texts import without_secrets
from swinv2_train.runtime.seeds_and_threads import available_cores
from swinv2_train.storage.atomic import replace_text
from swinv2_train.storage.json_files import listing, mapping, optional, read_json, record, text, whole

RECORDED_PACKAGES = (
    "swinv2-train", "torch", "deepspeed", "fairscale", "webdataset", "wandb", "hydra-core", "omegaconf", "numpy",
    "pillow", "simplejpeg", "timm", "safetensors",
)  # fmt: skip
GIB = 2**30
"""Bytes of a GiB."""


_MOST_BYTES = 2**24
"""The most that environment.json may hold: 1.5 kB for each start."""
_STARTS = listing(
    record(
        {},
        may={
            "start": record({}, may={"precision": text(20), "compile": text(200), "slow_bf16": optional(text(1000))}),
            "started_at": text(100), "hostname": text(300), "world_size": whole(), "cpu_cores": optional(whole()),
            "gpus": optional(listing(record({}, may={"name": text(300)}))), "versions": mapping(optional(text(300))),
        },
    )
)  # fmt: skip


def environment_record(world_size: int) -> dict[str, Any]:
    """What a reader needs to repeat or to judge a run: versions, commit, hardware, number of ranks, time, command.

    Versions come from the installed metadata (nothing is imported for them); null means not installed or not known.
    """
    import torch

    return {
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": [without_secrets(argument) for argument in sys.argv],
        "world_size": world_size,
        "git": git_commit(),
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_cores": available_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "versions": {"python": platform.python_version()} | {name: version_of(name) for name in RECORDED_PACKAGES},
    }


def record_environment(run_dir: Path, world_size: int, start: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Append this start's record to RUN_DIR/environment.json, a list with one entry per start.  Call it on rank 0.

    start: what it computes with and expects, kept as "start".  The file is replaced
    atomically.  An unreadable file (a torn copy, say) stays beside it as environment.json.damaged.
    """
    path = run_dir / "environment.json"
    record = environment_record(world_size) | ({} if start is None else {"start": dict(start)})
    starts = read_environment(run_dir)
    if os.path.lexists(path) and not starts:
        path.replace(path.with_name("environment.json.damaged"))
    starts.append(record)
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(starts, indent=2) + "\n")
    return record


def amend_start(run_dir: Path, facts: Mapping[str, Any]) -> None:
    """Put facts of the newest start, which became others while it ran, in place of those kept as "start".

    On rank 0.  What cannot be written is said on stderr alone: the run counts.
    """
    starts = read_environment(run_dir)
    if starts:
        starts[-1]["start"] = {**starts[-1].get("start", {}), **facts}
        try:
            replace_text(run_dir / "environment.json", json.dumps(starts, indent=2) + "\n")
        except OSError as error:
            print(f"environment.json keeps what was true at the start: {error}", file=sys.stderr)


def read_environment(run_dir: Path) -> list[dict[str, Any]]:
    """The records of all starts of a run, oldest first; empty when the file is missing or unreadable."""
    try:
        starts: list[dict[str, Any]] = read_json(run_dir / "environment.json", _MOST_BYTES, _STARTS)
    except (OSError, ConfigError):
        return []
    return starts


def git_commit() -> dict[str, Any] | None:
    """{"commit": hash, "dirty": bool} of the repository that tracks this very file, or that launch/train.sbatch took
    this copy from; None for an installed one.
    """
    file = Path(__file__).resolve()
    folder = file.parent
    if _git(folder, "ls-files", "--error-unmatch", file.name) is None:
        commit_file = file.parents[2] / "commit.txt"
        if not commit_file.is_file():
            return None
        changes = commit_file.with_name("changes.patch")
        return {"commit": commit_file.read_text().strip(), "dirty": changes.stat().st_size > 0}
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:  # a repository before its first commit
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; None when git is missing, slow or says no."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], check=False, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def version_of(package: str) -> str | None:
    """An installed package's version, from its metadata; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [{"name": device.name, "memory_gib": round(device.total_memory / GIB, 1)} for device in devices]
