"""Writing checkpoints, in the foreground or the background, and removing old ones."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Protocol

from swinv2_train.checkpoint.finding import (
    UNFINISHED,
    best_of,
    complete_checkpoints,
    free_name,
    remove_folder,
    remove_unfinished,
)
from swinv2_train.checkpoint.random_states import random_states
from swinv2_train.checkpoint.saved_state import COMPLETE
from swinv2_train.distributed import World, raise_together
from swinv2_train.storage.atomic import replace_text
from swinv2_train.storage.durable import Checksum, sync_folder, write_durably

_PARTS = "parts"
_VISIBLE_SEC = 60.0
"""How long a file may take to be seen by another host after it was written."""


class StateSnapshot(Protocol):
    """One rank's part of an engine's state."""

    @property
    def copying(self) -> Future[None] | None:
        """Until it is done, the engine's state may not change; None = until the snapshot is written."""

    def write(self, directory: Path) -> Mapping[str, Checksum]: ...


class Saveable(Protocol):
    """The part of an engine that a checkpoint needs."""

    def snapshot(self, copy: bool) -> StateSnapshot: ...


class SaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it are as they were."""


class Save:
    """One checkpoint on its way to the disk.  Making and finishing one are collective, what is between them is not.

    run_dir: exists.  state: JSON-able values; "step" is required.  keep: the newest checkpoints that stay, at least 1.
    best: the metric that keep_best watches and this checkpoint's value of it, oriented as it is named (a name that ends
    in "loss" is better when lower, any other when higher); the best by that metric stays besides the newest ones.
    background: the state is copied to CPU memory and written by threads while training goes on, which the engine's next
    step waits for as far as the copy goes; only one such save may be under way.  Otherwise finish() writes it.
    Raises SaveError or RankError on all ranks when any rank cannot write; the checkpoints before stay as they are.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Saveable,
        state: dict[str, Any],
        world: World,
        keep: int,
        best: tuple[str, float] | None,
        background: bool,
    ) -> None:
        assert keep >= 1, keep
        self.step = int(state["step"])
        self.path = run_dir / "checkpoints" / f"step_{self.step:08d}"
        self.error: Exception | None = None
        """What went wrong on this rank so far; finish() raises it on all."""
        self.warnings: list[str] = []
        """What could not be removed, and is no reason for the save to fail.  On rank 0 alone."""
        self._unfinished = self.path.with_name(self.path.name + UNFINISHED)
        self._state = json.dumps(
            dict(state, best=None if best is None else {"metric": best[0], "value": best[1]}), indent=1
        )
        self._run_dir, self._world, self._keep = run_dir, world, keep
        self._given_up, self._own_written, self._all_written = (threading.Event() for _ in range(3))
        self._thread: threading.Thread | None = None
        self._raise_together(self._caught(self._prepare) if world.is_main else None)
        self._raise_together(self._caught(lambda: self._take(engine, copy=background)))
        if background:
            self._thread = threading.Thread(target=self._in_background, name="checkpoint", daemon=True)
            self._thread.start()

    @property
    def under_way(self) -> bool:
        """True while this rank's thread has something to do."""
        return self._thread is not None and self._thread.is_alive()

    def wait_for_copy(self) -> None:
        """Until this rank's state is copied, and the optimizer may move."""
        if self._copying is not None:
            wait([self._copying])  # what goes wrong with it, finish() raises

    def finish(self) -> Path:
        """Wait until the checkpoint is complete; returns its path.  Collective."""
        if self._thread is None:
            self.error = self._caught(self._write_own_part)
        else:
            self._own_written.wait()
        self._raise_together(self.error)
        self._all_written.set()
        if self._thread is not None:
            self._thread.join()
        elif self._world.is_main:
            self.error = self._caught(self._commit)
        self._raise_together(self.error)
        return self.path

    def _in_background(self) -> None:
        self.error = self._caught(self._write_own_part)
        self._own_written.set()
        if self._world.is_main and self.error is None:
            self.error = self._caught(self._commit)

    def _caught(self, part: Callable[[], None]) -> Exception | None:
        """What a part of the save raises, in words for the user."""
        try:
            part()
        except Exception as error:  # noqa: BLE001  other ranks are waiting, and a thread has nobody to raise to
            remedy = "those before it are as they were; mend the disk, and the same command resumes"
            if not self._run_dir.is_dir():
                remedy = f"run_dir ({self._run_dir}) is gone: put it back, and the same command resumes, or starts anew"
            said = SaveError(
                f"{self.path}: the checkpoint could not be written ({error or type(error).__name__}); {remedy}"
            )
            said.__cause__ = error
            return said
        return None

    def _raise_together(self, error: Exception | None) -> None:
        try:
            raise_together(error)
        except Exception:
            self._failed()
            raise

    def _failed(self) -> None:
        """Let go of what a failed save has written: on a full disk the next one needs the room."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()
        if self._world.is_main:
            shutil.rmtree(self._unfinished, ignore_errors=True)

    # -----------------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        folder = self._run_dir / "checkpoints"
        folder.mkdir(exist_ok=True)  # not its parents: a run directory that vanished is gone
        if folder.is_symlink():
            raise OSError(
                f"{folder} is a link, and nothing is written outside of a run directory; one that is on another disk "
                "as a whole, and linked, is written to"
            )
        self.warnings += remove_unfinished(self._run_dir)[1]
        if os.path.lexists(self._unfinished):  # what could not be removed
            os.replace(self._unfinished, free_name(self._unfinished.with_name(f"{self._unfinished.name}.left")))
        for folder in (self._unfinished, *(self._unfinished / name for name in ("engine", "rng", _PARTS))):
            folder.mkdir()

    def _take(self, engine: Saveable, copy: bool) -> None:
        self._snapshot, self._random_states = engine.snapshot(copy), random_states(self._world)
        self._copying = self._snapshot.copying

    def _write_own_part(self) -> None:
        """This rank's files, and when they are on the disk their checksums."""
        sums = {f"engine/{name}": made for name, made in self._snapshot.write(self._unfinished / "engine").items()}
        contents = {f"rng/{name}": text for name, text in self._random_states.items()}
        if self._world.is_main:
            contents["state.json"] = (self._state + "\n").encode()
        for name, content in contents.items():
            sums[name] = write_durably(self._unfinished / name, [content])
        for folder in (self._unfinished / "engine", self._unfinished / "rng"):
            sync_folder(folder)
        part = self._unfinished / _PARTS / f"rank_{self._world.rank:04d}.json"
        replace_text(part, json.dumps(sums))
        del self._snapshot  # and its memory

    def _commit(self) -> None:
        """Collect every rank's checksums in COMPLETE and give the folder its name.  Rank 0 only."""
        files = {}
        for rank in range(self._world.world_size):
            for name, (num_bytes, crc32) in json.loads(self._part_of(rank)).items():
                files[name] = {"bytes": num_bytes, "crc32": f"{crc32:08x}", "rank": rank}
        shutil.rmtree(self._unfinished / _PARTS)
        marker = {"step": self.step, "world_size": self._world.world_size, "files": files}
        write_durably(self._unfinished / COMPLETE, [(json.dumps(marker, indent=1) + "\n").encode()])
        sync_folder(self._unfinished)
        if os.path.lexists(self.path):  # the same step again, after a resume from an earlier checkpoint
            replaced = self.path.with_name(self.path.name + ".replaced" + UNFINISHED)
            if os.path.lexists(replaced):  # one that could not be removed
                os.replace(replaced, free_name(replaced.with_name(f"{replaced.name}.left")))
            os.replace(self.path, replaced)
            os.replace(self._unfinished, self.path)
            self._warn(remove_folder(replaced))
        else:
            os.replace(self._unfinished, self.path)
        sync_folder(self.path.parent)
        for problem in _retain(self._run_dir, self._keep, self.path):
            self._warn(problem)

    def _warn(self, problem: str | None) -> None:
        if problem is not None:
            self.warnings.append(problem)

    def _part_of(self, rank: int) -> str:
        """The checksums that a rank has written; waits for them."""
        part = self._unfinished / _PARTS / f"rank_{rank:04d}.json"
        deadline: float | None = None
        while not part.exists():
            if self._given_up.is_set():
                raise OSError("another rank could not write its part")
            if deadline is None and self._all_written.is_set():
                deadline = time.monotonic() + _VISIBLE_SEC
            if deadline is not None and time.monotonic() > deadline:
                raise OSError(f"rank {rank} has written its part, but rank 0 cannot see it; is run_dir shared?")
            time.sleep(0.05)
        return part.read_text()


def _retain(run_dir: Path, keep: int, written: Path) -> list[str]:
    """Remove all but the newest, the best and the one just written, of which alone it is known that it is good.

    A link counts as the checkpoint that it leads to, and is left alone.  Returns what could not be removed, in words.
    """
    complete, _ = complete_checkpoints(run_dir)
    stay = {written, *complete[-keep:]}
    if (best := best_of(complete)) is not None:
        stay.add(best)
    problems = [_forget(path) for path in complete if path not in stay]
    return [problem for problem in problems if problem is not None]


def _forget(checkpoint: Path) -> str | None:
    """Remove a checkpoint; what hinders that, in words, or None."""
    if not checkpoint.is_symlink():
        try:
            (checkpoint / COMPLETE).unlink()  # from here on it is no checkpoint, also when the removal is cut short
        except OSError as error:
            return f"{checkpoint} cannot be removed ({error.strerror or error}); remove it when its disk lets you"
    return remove_folder(checkpoint)
