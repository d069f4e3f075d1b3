"""The process around a run: seeds, threads, stop signals, the lock of a run directory, the record of where it started.

Knows config and storage alone.
"""

from swinv2_train.runtime.arithmetic import arithmetic, arithmetic_record, check_workspace
from swinv2_train.runtime.environment import (
    RECORDED_PACKAGES,
    amend_start,
    environment_record,
    git_commit,
    read_environment,
    record_environment,
    version_of,
)
from swinv2_train.runtime.run_dir_lock import RunDirLock
from swinv2_train.runtime.seeds_and_threads import (
    available_cores,
    keep_random_state,
    release_memory,
    seed_everything,
    set_threads,
    tune_allocator,
)
from swinv2_train.runtime.stop_request import STOP_SIGNALS, StopNow, StopRequest

__all__ = [
    "RECORDED_PACKAGES",
    "RunDirLock",
    "STOP_SIGNALS",
    "StopNow",
    "StopRequest",
    "amend_start",
    "arithmetic",
    "arithmetic_record",
    "available_cores",
    "check_workspace",
    "environment_record",
    "git_commit",
    "keep_random_state",
    "read_environment",
    "record_environment",
    "release_memory",
    "seed_everything",
    "set_threads",
    "tune_allocator",
    "version_of",
]
