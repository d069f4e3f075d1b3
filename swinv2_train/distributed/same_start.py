"""Ranks that were all started alike, with the same configuration, packages and code."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import platform
import socket
from pathlib import Path
from typing import Any

from swinv2_train.config import Config, ConfigError
from swinv2_train.distributed.collectives import World, gather_objects
from swinv2_train.distributed.process_group import init_distributed
from swinv2_train.runtime import RECORDED_PACKAGES, set_threads, version_of

PER_HOST_KEYS = ("data.cache_dir", "engine.nvme_dir")  # folders on local disks, whose names may differ
MAX_LISTED = 5


def join_ranks(config: Config) -> World:
    """The world of a command whose ranks all came and were started alike, each with its threads."""
    world = init_distributed(config.runtime.process_group_timeout_sec)
    check_agreement(config)
    set_threads(config.runtime.num_threads, world.cores)
    return world


def check_agreement(config: Config) -> None:
    """ConfigError on every rank, which names hosts, values and remedy, unless all ranks were started as rank 0 was.

    Ranks of different code or settings would train on, each on its own idea of the run, or wait for each other for
    ever.  One exchange of a few kilobytes; the process group must be up.
    """
    everyone = gather_objects((socket.gethostname(), fingerprint(config)))
    first_host, first = everyone[0]
    differences = [
        f"rank {rank} ({host}) has {name} {theirs.get(name)}, rank 0 ({first_host}) has {first.get(name)}"
        for rank, (host, theirs) in enumerate(everyone)
        for name in sorted(first.keys() | theirs.keys())
        if theirs.get(name) != first.get(name)
    ]
    if differences:
        more = f"; and {len(differences) - MAX_LISTED} more" if len(differences) > MAX_LISTED else ""
        raise ConfigError(
            f"the ranks were not started alike: {'; '.join(differences[:MAX_LISTED])}{more}; "
            "start all of them with one command, in copies of one environment"
        )


def fingerprint(config: Config) -> dict[str, str]:
    """What must be the same on all ranks, by a name that a message can give."""
    found = {key: repr(value) for key, value in _flat("", dataclasses.asdict(config)) if key not in PER_HOST_KEYS}
    found |= {f"the package {name}": version_of(name) or "not at all" for name in RECORDED_PACKAGES}
    return found | {"Python": platform.python_version(), "the code of swinv2_train": _fingerprint()}


def _flat(prefix: str, values: dict[str, Any]) -> list[tuple[str, Any]]:
    """Keys as they are written on the command line."""
    pairs = []
    for name, value in values.items():
        pairs += _flat(f"{prefix}{name}.", value) if isinstance(value, dict) else [(prefix + name, value)]
    return pairs


@functools.cache  # they were imported: what becomes of them later does not matter here
def _fingerprint() -> str:
    """A hash of the package's source files."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted((*package.rglob("*.py"), *package.rglob("*.cpp"), *package.rglob("*.h"))):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
