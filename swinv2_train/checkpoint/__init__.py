"""Run state on disk, complete or absent.

RUN_DIR/checkpoints/step_00000100/
    engine/          the engine's sharded state, every rank its own part
    rng/rank_0000.json, .safetensors   random states of each rank
    state.json       step, images_seen, data position, names of the classes, ...
    COMPLETE         written last: step, world_size and of every file its size, checksum and the rank that wrote it

A checkpoint is built under a temporary name.  Each rank flushes its files to the disk and says so in a file of its own
(parts/); rank 0 collects these in COMPLETE and renames the folder.  A folder without COMPLETE, or one whose files are
not those in it, is no checkpoint.
"""

from swinv2_train.checkpoint.classes import checkpoint_classes
from swinv2_train.checkpoint.finding import (
    find_checkpoint,
    newest_checkpoint,
    remove_unfinished,
    verified_checkpoint,
)
from swinv2_train.checkpoint.loading import device_note, ema_note, load_checkpoint, read_checkpoint_weights
from swinv2_train.checkpoint.saved_state import COMPLETE, SCALE, read_state
from swinv2_train.checkpoint.saving import Save, SaveError

__all__ = [
    "COMPLETE",
    "SCALE",
    "Save",
    "SaveError",
    "checkpoint_classes",
    "device_note",
    "ema_note",
    "find_checkpoint",
    "load_checkpoint",
    "newest_checkpoint",
    "read_checkpoint_weights",
    "read_state",
    "remove_unfinished",
    "verified_checkpoint",
]
