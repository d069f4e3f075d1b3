"""A step that was not taken: its images, and the state before it, from which swinv2-replay repeats it.

RUN_DIR/bad_steps/ holds step_NNNNNNNN.json for every such step and, of the first of the run's last start that had one,
a checkpoint of the step before.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from swinv2_train.config import ConfigError
from swinv2_train.distributed import World, gather_objects, on_main
from swinv2_train.runtime import keep_random_state
from swinv2_train.storage.atomic import replace_text
from swinv2_train.training.position import Position
from swinv2_train.training.saver import Saver

FOLDER = "bad_steps"


class BadStep(NamedTuple):
    """What is kept of a step that was not taken."""

    step: int
    cause: str
    images: list[list[list[tuple[str | None, str]]]]
    """(shard, key) by rank, micro-batch and row; the shard is None where images come through a pipe."""

    @property
    def world_size(self) -> int:
        return len(self.images)


def keep_bad_step(
    run_dir: Path,
    cause: str,
    micro_batches: Sequence[dict[str, Any]],
    position: Position,
    world: World,
    saver: Saver | None,
    put_back: Callable[[], None],
) -> str:
    """Write down the images of the step that follows on the position and, with a saver, the state before it.

    put_back: restores the random states that the step began with; they are afterwards what they were.  Collective.
    Returns what is to be said.  Nothing that goes wrong here is raised: it must not decide how the run goes on.
    """
    step, folder = position.step + 1, run_dir / FOLDER
    keys = [batch["keys"] for batch in micro_batches]
    shards: Sequence[Sequence[str | None]] | None = position.shards_of_next_step()
    shards = [[None] * len(rows) for rows in keys] if shards is None else shards
    own = [list(zip(*rows, strict=True)) for rows in zip(shards, keys, strict=True)]
    record = {"step": step, "cause": cause, "images": gather_objects(own)}

    def write() -> None:
        folder.mkdir(exist_ok=True)
        replace_text(folder / f"step_{step:08d}.json", json.dumps(record) + "\n")

    try:
        on_main(world, write)
        if saver is None:
            return f"the images of step {step} are in {folder}"
        after = keep_random_state(world.device)
        put_back()
        try:
            saver.save_apart(folder)
        finally:
            after()
    except Exception as error:  # noqa: BLE001  raised on every rank; see above
        return f"warning: step {step} cannot be repeated: {error}"
    command = f"swinv2-replay run_dir={shlex.quote(str(run_dir))}"
    return f"the images of step {step} and the state before it are in {folder}; {command} repeats it"


def read_bad_step(folder: Path, step: int) -> BadStep:
    """What keep_bad_step wrote.  Raises ConfigError for what it cannot have written."""
    path = folder / f"step_{step:08d}.json"
    try:
        record = json.loads(path.read_text())
        images = [
            [[(None if shard is None else str(shard), str(key)) for shard, key in rows] for rows in passes]
            for passes in record["images"]
        ]
        found = BadStep(int(record["step"]), str(record["cause"]), images)
        if found.step != step:
            raise ValueError(f"step {found.step}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{path} is no record of a step ({type(error).__name__}: {error}); restore it") from error
    return found
