"""Run state on disk, complete or absent.

RUN_DIR/checkpoints/step_00000100/
    engine/          the engine's sharded state, every rank its own part
    rng/rank_0000.json, .safetensors   random states of each rank
    state.json       step, images_seen, data position, config, ...
    COMPLETE         written last: step, world_size and every file with its size

A checkpoint is built under a temporary name, its files are flushed to disk, then COMPLETE is written and the folder
renamed.  A folder without COMPLETE, or one whose files do not have the sizes in it, is no checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from swinv2_train.config import ConfigError
from swinv2_train.distributed import World, raise_together
from swinv2_train.lazy import LazyTensors

COMPLETE = "COMPLETE"
_NAME = re.compile(r"step_(\d{8,})")
_UNFINISHED = ".unfinished"


class Saveable(Protocol):
    """The part of an engine that a checkpoint needs."""

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...


def save_checkpoint(
    run_dir: Path,
    engine: Saveable,
    state: dict[str, Any],
    world: World,
    keep: int,
    best: tuple[str, float] | None,
) -> Path:
    """Write the checkpoint of state["step"] and remove what retention no longer wants.  Collective.

    state: JSON-able values; "step" is required.  keep: the newest checkpoints that stay, at least 1.  best: the metric
    that keep_best watches and this checkpoint's value of it, oriented as it is named (a name that ends in "loss" is
    better when lower, any other when higher); the best checkpoint of all stays besides the newest ones.
    Returns the checkpoint's path.  Raises on all ranks when any rank cannot write.
    """
    assert keep >= 1, keep
    step = int(state["step"])
    final = run_dir / "checkpoints" / f"step_{step:08d}"
    unfinished = final.with_name(final.name + _UNFINISHED)
    raise_together(_prepare(run_dir, unfinished, world))
    engine.save(unfinished / "engine")
    raise_together(_write_own_part(unfinished, world))
    error: BaseException | None = None
    if world.is_main:
        try:
            content = dict(state, best=None if best is None else {"metric": best[0], "value": best[1]})
            (unfinished / "state.json").write_text(json.dumps(content, indent=1) + "\n")
            _commit(unfinished, final, step, world.world_size)
            _retain(run_dir, keep)
        except (OSError, TypeError, ValueError) as caught:
            error = caught
    raise_together(error)
    return final


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None when none was ever completed.  Call it on rank 0.

    A damaged one (a COMPLETE file, but a file missing or of another size) is passed over with a warning on stderr; when
    no whole one is left, that is a ConfigError: starting anew would overwrite the run's history.
    """
    complete, damaged = _complete_checkpoints(run_dir)
    if damaged and not complete:
        raise ConfigError(
            f"no checkpoint of {run_dir} is whole; {damaged[-1]}; restore its files, or start anew in another run_dir"
        )
    newest = complete[-1] if complete else None
    for problem in damaged:
        print(f"warning: damaged checkpoint passed over for {newest}: {problem}", file=sys.stderr)
    return newest


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that path means: RUN_DIR for its newest complete one, or RUN_DIR/checkpoints/step_N itself.

    Raises ConfigError when there is none, or when it is not whole.  Call on rank 0 and broadcast.
    """
    checkpoint = path if _NAME.fullmatch(path.name) else newest_checkpoint(path)
    if checkpoint is None:
        raise ConfigError(f"{path} holds no complete checkpoint; name the directory of a run that has saved one")
    _read_marker(checkpoint)
    return checkpoint


def load_checkpoint(path: Path, engine: Saveable, world: World) -> dict[str, Any]:
    """Restore engine and random states on every rank; returns the saved state.  Collective.

    Raises ConfigError on all ranks when path is no complete checkpoint or belongs to another world size.
    """
    error: BaseException | None = None
    state: dict[str, Any] = {}
    try:
        marker = _read_marker(path)
        if marker["world_size"] != world.world_size:
            raise ConfigError(
                f"{path} was saved by {marker['world_size']} ranks, this run has {world.world_size}; "
                f"start {marker['world_size']} ranks to resume it"
            )
        state = json.loads((path / "state.json").read_text())
    except (ConfigError, OSError, ValueError) as caught:
        error = caught
    raise_together(error)
    engine.load(path / "engine")
    raise_together(_restore_rng(path / "rng", world))  # last: loading may draw random numbers
    return state


def read_weights(checkpoint: Path) -> LazyTensors:
    """The float32 weights of a checkpoint by official name, read one at a time; saved by any number of ranks."""
    from swinv2_train.engine.consolidate import read_weights as read_engine_weights

    return read_engine_weights(checkpoint / "engine")


def remove_unfinished(run_dir: Path) -> list[Path]:
    """Delete what a killed save or removal left behind (folders without COMPLETE).  Rank 0 only; returns them."""
    folder = run_dir / "checkpoints"
    left = [
        path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if path.is_dir()
        and (path.name.endswith(_UNFINISHED) or (_NAME.fullmatch(path.name) and not (path / COMPLETE).exists()))
    ]
    for path in left:
        shutil.rmtree(path)
    return left


# --------------------------------------------------------------------------------------------------------------------
# Complete or absent


def _prepare(run_dir: Path, unfinished: Path, world: World) -> BaseException | None:
    if not world.is_main:
        return None
    try:
        remove_unfinished(run_dir)  # DeepSpeed overwrites in place: never write into an older attempt
        (unfinished / "rng").mkdir(parents=True)
    except OSError as error:
        return error
    return None


def _write_own_part(unfinished: Path, world: World) -> BaseException | None:
    """Random state of this rank, and its files flushed to disk (rank 0 flushes the shared ones in _commit)."""
    try:
        _save_rng(unfinished / "rng", world)
        mark = f"zero_pp_rank_{world.rank}_mp_rank"
        for path in (unfinished / "engine").rglob("*"):
            if path.is_file() and mark in path.name:
                _sync(path)
    except OSError as error:
        return error
    return None


def _commit(unfinished: Path, final: Path, step: int, world_size: int) -> None:
    files = {}
    for path in sorted(p for p in unfinished.rglob("*") if p.is_file()):
        _sync(path)
        files[path.relative_to(unfinished).as_posix()] = path.stat().st_size
    for folder in [p for p in unfinished.rglob("*") if p.is_dir()]:
        _sync(folder)
    marker = unfinished / COMPLETE
    marker.write_text(json.dumps({"step": step, "world_size": world_size, "files": files}, indent=1) + "\n")
    _sync(marker)
    _sync(unfinished)
    if final.exists():  # the same step again, after a resume from an earlier checkpoint
        replaced = final.with_name(final.name + ".replaced" + _UNFINISHED)
        if replaced.exists():
            shutil.rmtree(replaced)
        os.replace(final, replaced)
        os.replace(unfinished, final)
        shutil.rmtree(replaced)
    else:
        os.replace(unfinished, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    """Flush one file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_marker(path: Path) -> dict[str, Any]:
    """What COMPLETE says; raises ConfigError when there is none or a file has another size."""
    try:
        marker: dict[str, Any] = json.loads((path / COMPLETE).read_text())
        files, _, _ = marker["files"], marker["step"], marker["world_size"]
    except FileNotFoundError:
        raise ConfigError(f"{path} is no complete checkpoint ({COMPLETE} is missing); choose another") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path / COMPLETE}: cannot be read ({error}); choose another checkpoint") from error
    for name, size in files.items():
        file = path / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            found = "missing" if actual is None else f"{actual} bytes"
            raise ConfigError(f"{file}: {found}, {COMPLETE} says {size} bytes; choose another checkpoint")
    return marker


def _complete_checkpoints(run_dir: Path) -> tuple[list[Path], list[str]]:
    """Complete checkpoints, the oldest first; and what is wrong with those that were complete once."""
    found, damaged = [], []
    folder = run_dir / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if not match:
            continue
        try:
            _read_marker(path)
        except ConfigError as error:
            if (path / COMPLETE).exists():
                damaged.append(str(error))
            continue  # absent, by the definition above
        found.append((int(match[1]), path))
    return [path for _, path in sorted(found)], sorted(damaged)


def _retain(run_dir: Path, keep: int) -> None:
    complete, _ = _complete_checkpoints(run_dir)
    stay = set(complete[-keep:])
    rated = []
    for path in complete:
        best = json.loads((path / "state.json").read_text()).get("best")
        if best is not None and math.isfinite(best["value"]):
            value = -best["value"] if best["metric"].endswith("loss") else best["value"]
            rated.append((value, path))
    if rated:
        stay.add(max(rated)[1])
    for path in complete:
        if path not in stay:
            (path / COMPLETE).unlink()  # from here on it is no checkpoint, also when the removal is cut short
            shutil.rmtree(path)


# --------------------------------------------------------------------------------------------------------------------
# Random states, without pickle


def _save_rng(folder: Path, world: World) -> None:
    from safetensors.torch import save_file

    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    plain = {
        "python": [version, list(internal), gauss],
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }
    tensors = {"torch": torch.get_rng_state()}
    if world.device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(world.device)
    path = folder / f"rank_{world.rank:04d}"
    path.with_suffix(".json").write_text(json.dumps(plain) + "\n")
    save_file(tensors, path.with_suffix(".safetensors"))
    _sync(path.with_suffix(".json"))
    _sync(path.with_suffix(".safetensors"))


def _restore_rng(folder: Path, world: World) -> BaseException | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / f"rank_{world.rank:04d}"
    try:
        plain = json.loads(path.with_suffix(".json").read_text())
        tensors = load_file(path.with_suffix(".safetensors"))
        version, internal, gauss = plain["python"]
        name, keys, *rest = plain["numpy"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(tensors["torch"])
        if world.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["cuda"], world.device)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return ConfigError(f"{path}: the random state cannot be read ({error}); choose another checkpoint")
    return None
