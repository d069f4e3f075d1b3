"""What a run writes down: metrics.jsonl, pictures and their mirrors; and, through the console, what it shows.

Only rank 0 writes.  Everything that libraries print goes to RUN_DIR/logs/rank_NNNNN.log (console.py).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from swinv2_train.config import ConfigError, LogConfig
from swinv2_train.config.plain_files import open_regular
from swinv2_train.config.secret_texts import public
from swinv2_train.monitoring.console import Console, Progress, open_console
from swinv2_train.monitoring.tensorboard_sink import TensorBoardSink
from swinv2_train.monitoring.wandb_sink import Artifact, WandbSink
from swinv2_train.storage.atomic import replacing
from swinv2_train.storage.json_files import LARGEST

__all__ = ["Console", "RunLog", "open_console", "read_metrics"]

MOST_BYTES = 2**28
"""The most of metrics.jsonl that a page is made of; a million logged steps are about as much."""
MOST_NAMES = 500
"""The most metrics of a run that a page is made of; ours have 30."""
MOST_LINE_BYTES = 2**16
_MOST_NAME = 200
UNFINISHED = "val/unfinished"
"""1 at a step whose evaluation a stop has cut short, 0 when it is made up for."""


class RunLog:
    """metrics.jsonl, pictures/, their mirrors (wandb, TensorBoard) and the progress display of one run.

    Does nothing on ranks other than 0.

    run_config: the configuration as plain dicts and lists, recorded by the mirrors, without secrets.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        console: Console,
        is_main: bool,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.console = console
        self.is_main = is_main
        self._file: TextIO | None = None
        self._wandb: WandbSink | None = None
        self._tensorboard: TensorBoardSink | None = None
        self._progress: Progress | None = None
        if is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._progress = Progress(config.progress, console)
            if config.wandb != "disabled":
                self._wandb = WandbSink(run_dir, config, public(run_config or {}), console)
            if config.tensorboard:
                self._tensorboard = TensorBoardSink(run_dir, public(run_config or {}), console)

    def resume_at(self, step: int) -> None:
        """Drop the lines of steps after `step`, which are run again: at a start, and when a run goes back.

        The file is replaced atomically; a torn last line of a killed run goes too.
        """
        if self._tensorboard is not None:
            self._tensorboard.resume_at(step)
        path = self.run_dir / "metrics.jsonl"
        if not self.is_main or not path.exists():
            return
        if self._file is not None:
            self._file.close()
            self._file = None
        with replacing(path) as file:  # line by line: the file of a long run is larger than a process should be
            for line in _lines(path):
                if line["step"] <= step:
                    file.write((json.dumps(line) + "\n").encode())

    def metrics(self, step: int, images_seen: int, values: Mapping[str, float | None]) -> None:
        """Write one line.  step: completed optimizer steps.  nan, infinity and None are written as null (valid JSON).

        A later line of the same step adds to it: readers merge them (:func:`read_metrics`).
        """
        if not self.is_main:
            return
        clean = {name: _number(value) for name, value in values.items()}
        if self._file is None:
            self._file = _open_append(self.run_dir / "metrics.jsonl")
        try:
            self._file.write(json.dumps({"step": step, "images_seen": images_seen, **clean}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk; the system does not say which file it was
            raise OSError(error.errno, error.strerror, self._file.name) from error
        numbers = {name: value for name, value in clean.items() if value is not None}
        self._mirror({"step": step, "images_seen": images_seen, **numbers})

    def picture(self, name: str, step: int, array: np.ndarray) -> Path | None:
        """Write an image, uint8 (H, W, 3), to RUN_DIR/pictures/NAME_STEP.png and to the mirrors.  Returns its path."""
        if not self.is_main:
            return None
        from PIL import Image

        assert array.dtype == np.uint8 and array.ndim == 3, (
            f"a picture is uint8 (H, W, 3), not {array.dtype} {array.shape}"
        )
        path = self.run_dir / "pictures" / f"{name}_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            Image.fromarray(array).save(file, format="PNG")
        self._mirror({"step": step, f"pictures/{name}": array})
        return path

    def artifact(self, kind: str, files: Sequence[Path]) -> None:
        """Hand files to wandb as an artifact of the run, e.g. kind "weights"; nothing where there are none.

        wandb reads them when it uploads them, which is at `wandb sync` when offline: they must stay.
        """
        if self._wandb is not None and files:
            self._wandb.put(Artifact(kind, tuple(files)))

    def progress(self, step: int, total: int, loss: float | None = None, images_per_sec: float | None = None) -> None:
        """Move the display to `step` of `total`; loss and images/s stay as they were when None.  For every step."""
        if self._progress is not None:
            self._progress.update(step, total, loss, images_per_sec)

    def progress_within(self, step: int, total: int, number: int, count: int, seconds: float) -> None:
        """Show that of the step after `step` micro-batch `number` of `count` is done, this long after it began."""
        if self._progress is not None:
            self._progress.within(step, total, number, count, seconds)

    def say(self, text: str) -> None:
        """One line on the console (above the bar), from rank 0 only."""
        if self.is_main:
            self.console.say(text)

    def close(self, exit_code: int = 0) -> None:
        """End the display, close the file, give wandb a minute to write what it holds and tell it exit_code."""
        if self._progress is not None:
            self._progress.close()
        if self._file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take; metrics() has said so
                self._file.close()
            self._file = None
        if self._wandb is not None:
            self._wandb.close(exit_code)
            self._wandb = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _mirror(self, values: dict[str, Any]) -> None:
        for mirror in (self._wandb, self._tensorboard):
            if mirror is not None:
                mirror.put(values)


def scores_unfinished(run_dir: Path, step: int) -> bool:
    """Whether a stop has cut the scores of this step short (UNFINISHED)."""
    return any(line["step"] == step and line.get(UNFINISHED) == 1 for line in read_metrics(run_dir))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of RUN_DIR/metrics.jsonl, one dict per step in order of steps; later lines of a step win key by key.

    Empty when there is no file.  Torn lines of a killed run are left out, as is all that is no number of a metric.
    Raises ConfigError where the file holds more than MOST_BYTES or MOST_NAMES metrics.
    """
    path = run_dir / "metrics.jsonl"
    merged: dict[int, dict[str, Any]] = {}
    names: set[str] = set()
    if path.exists() and path.stat().st_size > MOST_BYTES:
        raise ConfigError(f"{path} holds more than {MOST_BYTES:,} bytes, of which no page is made; shorten it")
    for line in _lines(path) if path.exists() else ():
        merged.setdefault(line["step"], {}).update(line)
        names |= line.keys()
        if len(names) > MOST_NAMES:
            raise ConfigError(f"{path} holds more than {MOST_NAMES} metrics, of which no page is made; restore it")
    return [merged[step] for step in sorted(merged)]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Each whole line, as far as its values are numbers or null, with its step."""
    descriptor = open_regular(path)
    with open(descriptor, "rb") as file:
        while text := file.readline(MOST_LINE_BYTES):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):  # torn by a kill, or longer than a line of ours
                continue
            if isinstance(line, dict) and _is_count(line.get("step")):
                yield {name: value for name, value in line.items() if len(name) <= _MOST_NAME and _is_value(value)}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _is_value(value: object) -> bool:
    """A finite number, or null, which stands for what is none."""
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _open_append(path: Path) -> TextIO:
    torn = False
    if path.exists() and (size := path.stat().st_size):
        with open(open_regular(path), "rb") as whole:
            whole.seek(size - 1)
            torn = whole.read(1) != b"\n"
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115  open for the whole run
    if torn:
        file.write("\n")
    return file


def _number(value: float | None) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(value)
