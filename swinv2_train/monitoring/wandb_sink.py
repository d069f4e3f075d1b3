"""wandb's mirror of what a run writes down."""

from __future__ import annotations

import os
import queue
import re
import secrets
import threading
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swinv2_train.config import LogConfig
from swinv2_train.config.plain_files import read_bytes
from swinv2_train.monitoring.console import Console
from swinv2_train.runtime import git_commit
from swinv2_train.storage.atomic import replace_text

_INIT_SEC = 30.0
_CLOSE_SEC = 60.0
_RUN_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}\n?")


class Artifact(NamedTuple):
    """Files that wandb keeps, e.g. kind "weights"."""

    kind: str
    files: tuple[Path, ...]


class WandbSink:
    """A wandb run fed by a thread of its own, so that neither its start (1 to 3 s) nor its network is ever waited for.

    Each start of the process writes a new run file with the run id in RUN_DIR/wandb/run_id, so wandb shows a resumed
    run as one.  The x axis is our own "step" value, not wandb's counter, which refuses to go back: steps that are run
    again after a kill appear twice with the same numbers.
    """

    def __init__(self, run_dir: Path, config: LogConfig, run_config: dict[str, Any], console: Console) -> None:
        self._run_dir, self._config, self._run_config, self._console = run_dir, config, run_config, console
        self._queue: queue.SimpleQueue[dict[str, Any] | Artifact | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._exit_code = 0
        self._failed = False

    def put(self, values: dict[str, Any] | Artifact) -> None:
        """Hand over one history row, in which arrays are images, or an artifact."""
        if self._failed:  # nobody would take it out again
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()
        self._queue.put(values)

    def close(self, exit_code: int) -> None:
        """Write what is left; gives up after a minute."""
        if self._thread is None:
            return
        self._exit_code = exit_code
        self._queue.put(None)
        self._thread.join(_CLOSE_SEC)
        if self._thread.is_alive():
            self._console.say(f"warning: wandb did not finish within {_CLOSE_SEC:.0f} s; its last lines may be missing")

    def _work(self) -> None:
        try:
            run = self._start()
            while (values := self._queue.get()) is not None:
                if isinstance(values, Artifact):
                    self._log_artifact(run, values)
                else:
                    run.log(self._with_images(values))
            run.finish(exit_code=self._exit_code)
        except Exception as error:  # noqa: BLE001  wandb is a mirror: whatever ails it, the run goes on
            self._failed = True
            traceback.print_exc()
            self._console.say(f"warning: wandb stopped ({type(error).__name__}: {error}); the run goes on without it")

    def _start(self) -> Any:
        if self._config.wandb == "offline":
            os.environ.setdefault(
                "WANDB_ERROR_REPORTING", "false"
            )  # or its service reports crashes home; read at start
        import wandb

        folder = self._run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        id_path = folder / "run_id"
        if not id_path.exists() or not _RUN_ID.fullmatch(read_bytes(id_path, 1000)):
            replace_text(id_path, secrets.token_hex(4) + "\n")
        settings: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "save_code": False,
            "x_disable_meta": True,  # the command line among it; environment.json has it without secrets
            "init_timeout": _INIT_SEC,
            "x_transaction_log_flush_interval": 2.0,  # seconds that a kill can cost the run file
            "finish_timeout": _CLOSE_SEC - 5,
        }
        known = wandb.Settings.model_fields  # the last two are younger than the oldest wandb that we accept
        arguments: dict[str, Any] = {
            "mode": self._config.wandb,
            "project": self._config.wandb_project,
            "name": self._name,
            "id": id_path.read_text().strip(),
            "resume": "allow",
            "dir": str(self._run_dir),
            "config": self._run_config | {"git": git_commit()},
            "settings": wandb.Settings(**{name: value for name, value in settings.items() if name in known}),
        }
        try:
            run = wandb.init(**arguments)
        except Exception as error:
            if self._config.wandb != "online":
                raise
            reason = (str(error).splitlines() or [""])[0]  # no network on this node, or no key
            self._console.say(
                f"warning: wandb is not online ({reason}); it writes offline files: wandb sync {folder}/offline-run-*"
            )
            wandb.teardown()  # its service holds the run id
            run = wandb.init(**(arguments | {"mode": "offline"}))
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run

    @property
    def _name(self) -> str:
        return self._config.wandb_name or self._run_dir.resolve().name

    def _log_artifact(self, run: Any, artifact: Artifact) -> None:
        import wandb

        kept = wandb.Artifact(f"{run.id}-{artifact.kind}", type=artifact.kind, description=self._name)
        for file in artifact.files:
            kept.add_file(str(file), policy="immutable")  # no copy of it
        run.log_artifact(kept)

    def _with_images(self, values: dict[str, Any]) -> dict[str, Any]:
        import wandb

        return {name: wandb.Image(value) if isinstance(value, np.ndarray) else value for name, value in values.items()}
