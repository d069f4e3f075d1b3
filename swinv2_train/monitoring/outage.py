"""A start that an outage ends before the run goes on says so in status.json, where launch files look."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from swinv2_train.config import ConfigError, MachineError
from swinv2_train.config.secret_texts import without_secrets
from swinv2_train.monitoring.activity import STARTING
from swinv2_train.monitoring.signs import MOST_SIGN_BYTES, SIGN_FIELDS, STATUS
from swinv2_train.monitoring.watchdog import HEARTBEAT_SEC
from swinv2_train.runtime import RunDirLock
from swinv2_train.storage.atomic import replace_text
from swinv2_train.storage.json_files import number, read_json, record


@contextlib.contextmanager
def outage_recorded(run_dir: Path, lock: RunDirLock) -> Iterator[None]:
    """Around a start, before there is a Heartbeat: a MachineError passes on, and rank 0 has written it down.

    Not where another run holds the directory, and not where there is no directory yet.
    """
    try:
        yield
    except MachineError as error:
        if os.environ.get("RANK", "0") == "0":  # which it is also where the ranks did not meet
            with contextlib.suppress(OSError):
                record_outage(run_dir, lock, str(error), int(os.environ.get("WORLD_SIZE", "1")))
        raise


def record_outage(run_dir: Path, lock: RunDirLock, reason: str, world_size: int) -> None:
    """status.json as it was, where there is one, and in it that the start failed and another may succeed.

    Nothing where there is no directory yet.  Raises BlockingIOError where another run holds it.
    """
    lock.acquire()
    if not lock.held:
        return
    now = time.time()
    try:
        before: dict[str, Any] = read_json(
            run_dir / STATUS, MOST_SIGN_BYTES, record(SIGN_FIELDS | {"heartbeat_sec": number(0)})
        )
    except (FileNotFoundError, ConfigError):
        before = {"step": 0, "heartbeat_sec": HEARTBEAT_SEC}
    status = {
        **before, "host": socket.gethostname(), "pid": os.getpid(), "state": "failed", "outage": True,
        "reason": without_secrets(reason), "doing": STARTING, "doing_since": now, "updated_at": now,
        "world_size": world_size, "started_at": now,
    }  # fmt: skip
    replace_text(run_dir / STATUS, json.dumps(status, indent=1) + "\n")
