"""What a long job has found so far, on disk: a job that is killed goes on where it was, on any number of processes.

OUT.unfinished/ holds job.json (of what the rows are) and a file of each process and start with a line a batch: the
number of its first image, and a row for each.  A line that was cut off by a kill is found again.  When every image has
its row they are put in order into one file, and the folder goes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from swinv2_train.config import ConfigError
from swinv2_train.config.shown import shown
from swinv2_train.runtime.run_dir_lock import RunDirLock
from swinv2_train.storage.atomic import replace_text
from swinv2_train.storage.json_files import anything, listing, mapping, parse_json, read_json, record, whole

Range = tuple[int, int]
"""Numbers of images: the first, and the one behind the last."""
Row = dict[str, Any]

_JOB = "job.json"
_JOB_BYTES = 2**20
_FILE = re.compile(r"rows_(\d{4})_(\d{5})\.jsonl")
_LINE = record({"first": whole(), "rows": listing(mapping(anything()))})


class Piece(NamedTuple):
    """A line of a file: rows of neighbours."""

    first: int
    """The number of the first image."""
    images: int
    path: Path
    offset: int
    """Bytes."""


class Journal:
    """The rows of one job, in a folder that all processes see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start = 0
        """How many starts there were before; begin() counts them."""
        self._file: IO[bytes] | None = None
        self._lock: RunDirLock | None = None

    def begin(self, job: Mapping[str, Any], key: str) -> None:
        """Make the folder, or go on with the job of one that is there; by rank 0 alone.

        job: plain values by name, which rows depend on.  key: what named the output.  Raises ConfigError for the rows
        of another job, naming what differs, and while another process writes here.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{key}: {self.folder} cannot be made ({error.strerror}); name another place") from error
        self._lock = RunDirLock(self.folder, wait_sec=3.0)
        try:
            self._lock.acquire()
        except BlockingIOError as error:
            raise ConfigError(
                f"{key}: {self.folder} is being written by another process; end that first, or name another {key}"
            ) from error
        path, now = self.folder / _JOB, json.loads(json.dumps(job))
        try:
            then = read_json(path, _JOB_BYTES, mapping(anything()), f"delete {self.folder} to begin anew")
        except FileNotFoundError:
            replace_text(path, json.dumps(now) + "\n")
            then = now
        differing = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
        if differing:
            name = differing[0]
            raise ConfigError(
                f"{key}: {self.folder} holds rows of another job: {name} was {shown(then.get(name))} and is "
                f"{shown(now.get(name))}; give the same arguments, delete the folder to begin anew, or name another "
                f"{key}"
            )
        starts = [int(match[1]) for each in self.folder.iterdir() if (match := _FILE.fullmatch(each.name))]
        self.start = 1 + max(starts, default=-1)

    def open(self, start: int, rank: int) -> None:
        """Begin this process's file of this start.  Raises ConfigError where it does not see the folder."""
        if not (self.folder / _JOB).is_file():
            raise ConfigError(
                f"{self.folder} is not seen by every process; name a place on a file system that all hosts share"
            )
        self._file = (self.folder / f"rows_{start:04d}_{rank:05d}.jsonl").open("xb")

    def add(self, first: int, rows: Sequence[Row]) -> None:
        """Keep the rows of neighbours, the first of this number."""
        assert self._file is not None, "open() comes first"
        self._file.write(json.dumps({"first": first, "rows": rows}, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing more comes from this process."""
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            self._lock.release()

    def pieces(self) -> list[Piece]:
        """What is there, in the order of the images, each image once."""
        found = []
        for path in sorted(each for each in self.folder.iterdir() if _FILE.fullmatch(each.name)):
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    rows = _rows(line)
                    if rows is not None:
                        found.append(Piece(rows["first"], len(rows["rows"]), path, offset))
                    offset += len(line)
        return _once(found)

    def rows(self, pieces: Sequence[Piece]) -> Iterator[Row]:
        """The rows of pieces, one after the other."""
        files: dict[Path, IO[bytes]] = {}
        try:
            for piece in pieces:
                if piece.path not in files:
                    files[piece.path] = piece.path.open("rb")
                files[piece.path].seek(piece.offset)
                found = _rows(files[piece.path].readline())
                assert found is not None, f"{piece.path} was written by somebody else"
                yield from found["rows"][: piece.images]
        finally:
            for file in files.values():
                file.close()

    def remove(self) -> None:
        """All rows are elsewhere."""
        self.close()
        shutil.rmtree(self.folder)


def missing(pieces: Sequence[Piece], count: int) -> list[Range]:
    """The images, of so many, of which there is no row yet."""
    found, at = [], 0
    for piece in pieces:
        if piece.first > at:
            found.append((at, piece.first))
        at = piece.first + piece.images
    return [*found, (at, count)] if at < count else found


def share(ranges: Sequence[Range], batch: int, rank: int, world_size: int) -> list[Range]:
    """A rank's part: neighbours, in whole batches, so that no rank has over a batch more than another."""
    batches = [(first, min(first + batch, end)) for low, end in ranges for first in range(low, end, batch)]
    each, more = divmod(len(batches), world_size)
    first = rank * each + min(rank, more)
    mine: list[Range] = []
    for low, end in batches[first : first + each + (rank < more)]:
        if mine and mine[-1][1] == low:
            mine[-1] = (mine[-1][0], end)
        else:
            mine.append((low, end))
    return mine


def _rows(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None for one that was not written to its end."""
    if not line.endswith(b"\n"):
        return None
    try:
        found: dict[str, Any] = parse_json(line, "a line", _LINE)
    except ConfigError:
        return None
    return found


def _once(pieces: Sequence[Piece]) -> list[Piece]:
    """In order; of images that come twice the first: what overlaps another is left out as a whole."""
    kept: list[Piece] = []
    for piece in sorted(pieces):
        if not kept or piece.first >= kept[-1].first + kept[-1].images:
            kept.append(piece)
    return kept
