"""Which folders are checkpoints, which of them are whole, and which is the newest."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from swinv2_train.checkpoint.saved_state import COMPLETE, read_complete, read_state
from swinv2_train.config import ConfigError, lower_is_better
from swinv2_train.config.shown import MESSAGE_CHARACTERS, shown
from swinv2_train.distributed import World, broadcast_object, raise_together
from swinv2_train.distributed.interruptible import unless_stopped
from swinv2_train.runtime import StopRequest
from swinv2_train.storage.durable import checksum_of

UNFINISHED = ".unfinished"
"""The end of the name of what is being written or removed."""
DAMAGED = ".damaged"
"""The end of the name of what was set aside."""
_NAME = re.compile(r"step_(\d{8,})")


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None when none was ever completed.  Call it on rank 0.

    Sizes are checked, contents are not (verified_checkpoint does).  A damaged one (a COMPLETE file, but a file missing
    or of another size) is passed over with a warning on stderr; when no whole one is left, that is a ConfigError:
    starting anew would overwrite the run's history.
    """
    complete, damaged = complete_checkpoints(run_dir)
    if damaged and not complete:
        raise ConfigError(
            f"no checkpoint of {run_dir} is whole; {damaged[-1]}; restore its files, or start anew in another run_dir"
        )
    newest = complete[-1] if complete else None
    for problem in damaged:
        warning = f"warning: damaged checkpoint passed over for {newest}: {problem}"
        print(shown(warning, MESSAGE_CHARACTERS), file=sys.stderr)
    return newest


def verified_checkpoint(newest: Path | None, world: World, stop: StopRequest | None = None) -> Path | None:
    """The newest checkpoint of a run to resume from, whose every byte is as it was written.  Collective.

    newest: what newest_checkpoint gives.  Each rank compares the checksums of its part, so that together the ranks read
    everything once.  A damaged checkpoint is named on stderr and set aside under a name that ends in .damaged, where
    retention does not count it, and all ranks go on to the one before; a ConfigError when none is left.  stop: may
    come meanwhile; StopNow on every rank.
    """
    problem: ConfigError | None = None
    while newest is not None:
        older: tuple[Path | None, str | None] = (None, None)
        try:
            raise_together(unless_stopped(stop, partial(_content_problem, newest, world)))
            return newest
        except ConfigError as caught:
            problem = caught
        if world.is_main:
            older = _passed_over(newest, problem)
        newest, said = broadcast_object(older)
        if said is not None:
            raise ConfigError(said) from problem
    return None


def _content_problem(checkpoint: Path, world: World) -> ConfigError | None:
    """What is wrong with this rank's part of a checkpoint that any number of ranks has written."""
    try:
        for name, facts in read_marker(checkpoint)["files"].items():
            if facts["rank"] % world.world_size == world.rank:
                found = checksum_of(checkpoint / name)
                if found.crc32 != int(facts["crc32"], 16):
                    raise ConfigError(
                        f"{checkpoint / name}: damaged: its content has checksum {found.crc32:08x}, {COMPLETE} says "
                        f"{facts['crc32']}"
                    )
    except ConfigError as error:
        return error
    except (OSError, KeyError, TypeError, ValueError) as error:
        return ConfigError(f"{checkpoint}: cannot be read ({error})")
    return None


def _passed_over(damaged: Path, problem: ConfigError) -> tuple[Path | None, str | None]:
    """Set a damaged checkpoint aside; returns the one before it, or why there is none to go on from.  Rank 0 only."""
    run_dir = damaged.parent.parent
    complete, _ = complete_checkpoints(run_dir)
    older = [path for path in complete if path != damaged]
    if not older:
        return None, (
            f"no checkpoint of {run_dir} is whole; {problem}; restore its files, or start anew in another run_dir"
        )
    aside = damaged.with_name(damaged.name + DAMAGED)
    remove_folder(aside)
    aside = free_name(aside)
    try:
        os.replace(damaged, aside)
    except OSError as error:
        return None, f"{damaged} is damaged ({problem}) and cannot be renamed ({error}); remove it and start again"
    print(f"warning: {problem}; renamed to {aside.name}; going on from {older[-1]}", file=sys.stderr)
    return older[-1], None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that path means: RUN_DIR for its newest complete one, or RUN_DIR/checkpoints/step_N itself.

    Sizes are checked, contents are not.  Raises ConfigError when there is none, or when it is not whole.  Call on rank
    0 and broadcast.
    """
    checkpoint = path if _NAME.fullmatch(path.name) else newest_checkpoint(path)
    if checkpoint is None:
        raise ConfigError(f"{path} holds no complete checkpoint; name the directory of a run that has saved one")
    read_marker(checkpoint)
    return checkpoint


def remove_unfinished(run_dir: Path) -> tuple[list[Path], list[str]]:
    """Delete what a killed save or removal left behind (folders without COMPLETE).  Rank 0 only.

    Returns what was deleted, and in words what could not be; links are left alone.
    """
    folder = run_dir / "checkpoints"
    left = [
        path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if path.is_dir()
        and not path.is_symlink()
        and (path.name.endswith(UNFINISHED) or (_NAME.fullmatch(path.name) and not (path / COMPLETE).exists()))
    ]
    problems = {path: remove_folder(path) for path in left}
    removed = [path for path, problem in problems.items() if problem is None]
    return removed, [problem for problem in problems.values() if problem is not None]


def remove_folder(path: Path) -> str | None:
    """Delete a folder with what is in it; what hinders that, in words, or None.

    A link is left alone, with what it leads to: somebody has moved a checkpoint to another disk.  A folder may stay
    because it is read-only, or because a network file system keeps files that another host has open (.nfs*).
    """
    if path.is_symlink():
        return f"{path} is a link, which is left alone; remove it, and what it leads to, when neither is needed"
    if not path.exists():
        return None
    try:
        shutil.rmtree(path)
    except OSError as error:
        return f"{path} cannot be removed ({error.strerror or error}); remove it when its disk lets you"
    return None


def free_name(path: Path) -> Path:
    """path, or where something stands there, the first of path.1, path.2, ... where nothing does."""
    return next(each for each in (path, *(path.with_name(f"{path.name}.{i}") for i in range(1, 10_000)))
                if not os.path.lexists(each))  # fmt: skip


def read_marker(path: Path) -> dict[str, Any]:
    """What COMPLETE says; raises ConfigError when there is none or a file has another size."""
    marker = read_complete(path)
    for name, facts in marker["files"].items():
        file, size = path / name, facts["bytes"]
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            found = "missing" if actual is None else f"{actual} bytes"
            raise ConfigError(f"{file}: {found}, {COMPLETE} says {size} bytes; choose another checkpoint")
    return marker


def complete_checkpoints(run_dir: Path) -> tuple[list[Path], list[str]]:
    """Complete checkpoints, the oldest first; and what is wrong with those that were complete once."""
    found, damaged = [], []
    folder = run_dir / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if not match:
            continue
        try:
            read_marker(path)
        except ConfigError as error:
            if (path / COMPLETE).exists():
                damaged.append(str(error))
            continue  # absent, by the definition above
        found.append((int(match[1]), path))
    return [path for _, path in sorted(found)], sorted(damaged)


def best_of(complete: Sequence[Path]) -> Path | None:
    """The checkpoint with the best score among a run's, the oldest first; None where none was scored.

    Only scores by the metric of the newest scored one count: what train.keep_best was before is not comparable.
    """
    rated = []
    for path in complete:
        try:
            best = read_state(path).get("best")
        except ConfigError:  # damaged unseen; it must not end the save of a good one
            continue
        if best is not None and math.isfinite(best["value"]):
            value = -best["value"] if lower_is_better(best["metric"]) else best["value"]
            rated.append((best["metric"], value, path))
    comparable = [(value, path) for metric, value, path in rated if metric == rated[-1][0]]
    return max(comparable)[1] if comparable else None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))
