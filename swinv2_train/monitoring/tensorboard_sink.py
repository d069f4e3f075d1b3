"""TensorBoard's mirror of what a run writes down."""

from __future__ import annotations

import importlib.util
import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from swinv2_train.config import ConfigError, LogConfig
from swinv2_train.monitoring.console import Console

_FLUSH_SEC = 10
"""What a kill may cost of the event files."""


def check_tensorboard(config: LogConfig) -> None:
    """Raises ConfigError where log.tensorboard is set and the package is missing."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "log.tensorboard=true needs tensorboard, which is not installed: pip install tensorboard (in the "
            "repository: pip install -e '.[tensorboard]'), or set log.tensorboard=false"
        )


class TensorBoardSink:
    """Event files in RUN_DIR/tensorboard by torch's writer, whose thread does the writing.

    Every start begins a file of its own.  Its first record tells TensorBoard the step at which the run goes on, so that
    steps that are run again are shown once.
    """

    def __init__(self, run_dir: Path, run_config: Mapping[str, Any], console: Console) -> None:
        self._folder, self._run_config, self._console = run_dir / "tensorboard", run_config, console
        self._step = 0
        self._writer: Any = None
        self._failed = False

    def resume_at(self, step: int) -> None:
        """The run goes on behind this step: what was written of later ones no longer holds."""
        self.close()
        self._step = step

    def put(self, values: Mapping[str, Any]) -> None:
        """One row: "step", numbers by name, and pictures, uint8 (H, W, 3)."""
        if self._failed:
            return
        try:
            if self._writer is None:
                self._writer = self._open()
            for name, value in values.items():
                if isinstance(value, np.ndarray):
                    self._writer.add_image(name, value, values["step"], dataformats="HWC")
                elif name != "step":
                    self._writer.add_scalar(name, value, values["step"])
        except Exception as error:  # noqa: BLE001  it is a mirror: whatever ails it, the run goes on
            self._fail(error)

    def close(self) -> None:
        """Write what is left."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close()
        except Exception as error:  # noqa: BLE001  as above
            self._fail(error)

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self._folder), purge_step=self._step + 1, flush_secs=_FLUSH_SEC)
        config = json.dumps(self._run_config, indent=2)
        writer.add_text("config", "\n".join("    " + line for line in config.splitlines()), self._step + 1)
        return writer

    def _fail(self, error: Exception) -> None:
        self._failed, self._writer = True, None
        traceback.print_exception(error)
        self._console.say(f"warning: TensorBoard's files stopped ({type(error).__name__}: {error}); the run goes on")
