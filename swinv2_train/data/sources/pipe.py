"""Samples from the output of a shell command (data.shards="pipe:COMMAND"), read once from front to back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from swinv2_train.config.secret_texts import without_secrets
from swinv2_train.data.sample import Sample, ShardError, read_targets
from swinv2_train.data.shards.pattern import expand_commands
from swinv2_train.data.shards.tar_index import IMAGE_EXTENSIONS, tar_members

NOT_ELASTIC = (
    "warning: data.shards is a pipe, so this run is not elastic: a resume, on whatever number of processes, starts the "
    "stream anew, and no epoch counts its images (docs/data.md)"
)


_IGNORE_SIGNALS = "trap '' INT TERM USR1 USR2\n"
"""Ctrl-C and the scheduler's signals are answered by the training process; a command cut off by one would be damage."""


@dataclass(frozen=True)
class Stream:
    """What stands for the manifest where there is none."""

    commands: tuple[str, ...]
    """One for each shard, without ``pipe:``."""
    num_samples = 0
    """Not known; load_config demands that every length is given in steps."""
    label_range = None
    """Not known; each label is looked at when it comes."""


def open_stream(pattern: str, key: str = "data.shards") -> Stream:
    """The commands of a pattern of ``pipe:COMMAND`` parts; nothing is run yet.  Raises ShardError."""
    return Stream(tuple(expand_commands(pattern, key)))


def read_command(command: str) -> Iterator[Sample]:
    """The samples of the tar that a shell command prints, in order.

    Raises ShardError, naming the command, when it fails, or prints a tar that is cut off or damaged in any way; the
    last sample before that is not given, as it may be half of one.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    output = _CommandOutput(command)
    last: dict[str, Any] | None = None
    try:
        try:
            for raw in group_by_keys(tar_file_expander([{"url": output.name, "stream": output}])):
                if last is not None:
                    yield _sample(last, output.name)
                last = raw
        except Exception as error:
            output.check()  # knows better what is wrong
            raise ShardError(f"{output.name}: {error.args[0] if error.args else type(error).__name__}") from error
        output.check()
        if last is not None:
            yield _sample(last, output.name)
        else:
            warnings.warn(f"{output.name}: the shard holds no samples", stacklevel=2)
    finally:
        output.close()


def _sample(raw: dict[str, Any], name: str) -> Sample:
    """The members that the index would choose."""
    extension = next((each for each in IMAGE_EXTENSIONS if each in raw), "")
    return Sample(raw["__key__"], raw.get(extension, b""), extension, read_targets(raw), name)


def _pass_on(words: IO[bytes]) -> None:
    """What a command says, without the addresses' secrets: wget says the whole of each."""
    with words:
        for line in words:
            sys.stderr.write(without_secrets(line.decode("utf-8", "replace")))
            sys.stderr.flush()


class _CommandOutput:
    """What a command prints.  tar_members walks it and is the one to read; webdataset is given what that has passed."""

    def __init__(self, command: str) -> None:
        self.name = without_secrets(f"pipe:{command}")
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _IGNORE_SIGNALS + command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=1 << 18,
            start_new_session=True,
        )
        self._words = threading.Thread(target=_pass_on, args=(self._process.stderr,), daemon=True)
        self._words.start()
        self._window, self._given, self._passed, self._arrived = bytearray(), 0, 0, 0
        self._at_end = False
        self._members = tar_members(self, self.name)
        self._problem: ShardError | None = None
        self._walked = False

    def read(self, size: int) -> bytes:
        """For webdataset: at most `size` bytes, none at the end or where damage begins."""
        while self._passed == self._given and not self._walked:
            self._walk()
        data = bytes(self._window[: min(size, self._passed - self._given)])
        del self._window[: len(data)]
        self._given += len(data)
        return data

    def check(self) -> None:
        """Walk to the end; raises ShardError when the command failed or the tar is damaged."""
        while not self._walked:
            self._walk()
            del self._window[: self._passed - self._given]
            self._given = self._passed
        if self._at_end:
            status = self._process.wait()
            if status != 0:
                self._words.join(1.0)
                how = f"signal {-status}" if status < 0 else f"exit status {status}"
                raise ShardError(
                    f"{self.name}: the command failed ({how}, after {self._arrived} bytes); its own words are in the "
                    "rank's log: mend the command or what it reads"
                )
        if self._problem is not None:
            raise self._problem

    def close(self) -> None:
        """End the command, if it runs, with all that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()
        self._words.join(1.0)  # its last ones; a program that it left in the background may hold on to its stderr

    def read_at(self, size: int, position: int) -> bytes:
        self._fill(position + size)
        first = position - self._given
        return bytes(self._window[first : first + size])

    def reaches(self, end: int) -> bool:
        self._fill(end)
        return end <= self._arrived

    def size(self) -> int:
        return self._arrived

    def _fill(self, end: int) -> None:
        """Let the command's output come until there are `end` bytes."""
        assert self._process.stdout is not None
        if self._arrived < end and not self._at_end:
            data = self._process.stdout.read(end - self._arrived)
            self._at_end = len(data) < end - self._arrived
            self._window += data
            self._arrived += len(data)

    def _walk(self) -> None:
        """To the end of the next member, or of all."""
        try:
            _, start, size = next(self._members)
            self._passed = start + size
        except StopIteration:
            self._passed, self._walked = self._arrived, True
        except ShardError as error:
            self._problem, self._walked = error, True
