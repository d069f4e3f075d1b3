"""The two JSON files of a checkpoint that say what it is: COMPLETE and state.json, checked when they are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from swinv2_train.config import ConfigError
from swinv2_train.data.class_names import CLASSES, CLASSES_BYTES
from swinv2_train.storage.json_files import file_name, mapping, number, optional, read_json, record, text, whole

COMPLETE = "COMPLETE"
STATE = "state.json"
SCALE = "lora_scale"
"""In state.json what a run's adapters (LoRA) are multiplied by, where it has some."""
MOST_RANKS = 2**20
_COMPLETE_BYTES, _STATE_BYTES = 2**25, 2 * CLASSES_BYTES
"""The most that the files may hold: COMPLETE has 200 bytes for each file of a rank, state.json the classes' names."""
_ANOTHER = "choose another checkpoint"


def _score(value: Any, where: str) -> None:
    """A number that may be NaN: what was measured of a model that diverged."""
    if not isinstance(value, float) or math.isfinite(value):
        number()(value, where)


_MARKER = record(
    {
        "step": whole(),
        "world_size": whole(1, MOST_RANKS),
        "files": mapping(
            record({"bytes": whole()}, may={"crc32": text(8), "rank": whole(0, MOST_RANKS - 1)}), names=file_name()
        ),
    }
)
_SHAPE = record(
    {"step": whole(), "images_seen": whole()},
    may={
        **{name: whole(1) for name in ("first_batch_size", "batch_size")},
        "data": record(
            {"manifest": optional(text(200))},
            may={name: whole() for name in ("images_seen", "bad_images", "seed", "lanes", "window_shards")},
        ),
        "classes": optional(CLASSES),
        SCALE: number(0),
        "best": optional(record({"metric": text(200), "value": _score})),
    },
)


def read_complete(checkpoint: Path) -> dict[str, Any]:
    """What COMPLETE says: step, world_size, and of every file its size, and its checksum and the rank that wrote it.

    Raises ConfigError, also where there is none.
    """
    try:
        marker: dict[str, Any] = read_json(checkpoint / COMPLETE, _COMPLETE_BYTES, _MARKER, _ANOTHER)
    except FileNotFoundError:
        raise ConfigError(f"{checkpoint} is no complete checkpoint ({COMPLETE} is missing); {_ANOTHER}") from None
    return marker


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What was saved beside the engine's state: step, images_seen, data, classes and others.  Raises ConfigError."""
    try:
        state: dict[str, Any] = read_json(checkpoint / STATE, _STATE_BYTES, _SHAPE, _ANOTHER)
    except FileNotFoundError:
        raise ConfigError(f"{checkpoint / STATE} is missing; {_ANOTHER}") from None
    return state
