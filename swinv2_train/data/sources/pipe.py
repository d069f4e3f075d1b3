"""Samples from the output of a shell command (data.shards="pipe:COMMAND"), read once from front to back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

from swinv2_train.config.secret_texts import without_secrets
from swinv2_train.config.shown import shown
from swinv2_train.data.sample import Sample, ShardError, read_targets
from swinv2_train.data.shards.pattern import expand_commands
from swinv2_train.data.shards.tar_index import SAMPLE_EXTENSIONS, PassedOver, TarEntry, sample_member, tar_entries

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


def read_command(command: str, image_member: str | None = None) -> Iterator[Sample]:
    """The samples of the tar that a shell command prints, in order, each as the index would choose its members.

    image_member: as build_index's.

    Raises ShardError, naming the command, when it fails, or prints a tar that is cut off or damaged in any way; the
    last sample before that is not given, as it may be half of one.  An index finds a sample's members wherever they
    lie; here they must be neighbours, so a key that comes again after others is an error too.
    """
    output = _CommandOutput(command)
    try:
        whole: Sample | None = None
        for sample in _grouped(output, image_member):
            if whole is not None:
                yield whole
            whole = sample
        if whole is not None:
            yield whole
        else:
            warnings.warn(f"{shown(output.name)}: the shard holds no samples", stacklevel=2)
    finally:
        output.close()


def _grouped(output: _CommandOutput, image_member: str | None) -> Iterator[Sample]:
    key, members = "", dict[str, bytes]()
    earlier: set[str] = set()
    passed_over = PassedOver()
    for entry in output.entries():
        named = sample_member(entry.name) if entry.is_file else None
        if named is None:
            passed_over.note(entry)
            continue
        if named[0] != key:
            if members:
                yield _sample(key, members, output.name, image_member)
            earlier.add(key)
            key, members = named[0], {}
            if key in earlier:
                raise ShardError(
                    f"{output.name}: the key {key!r:.200} comes again after others; a pipe can be read once only, so "
                    "write a sample's members side by side (tar --sort=name)"
                )
        if named[1] in members:
            raise ShardError(
                f"{output.name}: {entry.name:.200}: duplicate; keys must be unique within a shard: write it again"
            )
        members[named[1]] = output.read_at(entry.size, entry.offset)
    passed_over.warn(output.name)
    if members:
        yield _sample(key, members, output.name, image_member)


def _sample(key: str, members: dict[str, bytes], name: str, image_member: str | None) -> Sample:
    wanted = SAMPLE_EXTENSIONS if image_member is None else (image_member,)
    extension = next((each for each in wanted if each in members), "")
    return Sample(key, members.get(extension, b""), extension, read_targets(members), name)


def _pass_on(words: IO[bytes]) -> None:
    """What a command says, without the addresses' secrets: wget says the whole of each."""
    with words:
        for line in words:
            sys.stderr.write(without_secrets(line.decode("utf-8", "replace")))
            sys.stderr.flush()


def _started(command: str) -> subprocess.Popen[bytes]:
    """The command's shell, begun in a thread: handlers run in the main thread, where the exception of a stop could lose
    a start half done, and nobody would end the command."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        started.append(
            subprocess.Popen(
                ["/bin/sh", "-c", _IGNORE_SIGNALS + command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=1 << 18,
                start_new_session=True,
            )
        )

    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(start).result()
        except BaseException:
            thread.shutdown()
            for process in started:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            raise
    return started[0]


class _CommandOutput:
    """What a command prints, walked by the index's own reader of tars."""

    def __init__(self, command: str) -> None:
        self.name = without_secrets(f"pipe:{command}")
        self._process = _started(command)
        self._words = threading.Thread(target=_pass_on, args=(self._process.stderr,), daemon=True)
        self._words.start()
        self._window, self._start, self._arrived = bytearray(), 0, 0
        self._at_end = False

    def entries(self) -> Iterator[TarEntry]:
        """Every member; its content can be read until the next one is asked for.

        Raises ShardError when the command failed or the tar is damaged.
        """
        problem: ShardError | None = None
        try:
            yield from tar_entries(self, self.name)
        except ShardError as error:
            problem = error
        if self._at_end:
            status = self._process.wait()
            if status != 0:
                self._words.join(1.0)
                how = f"signal {-status}" if status < 0 else f"exit status {status}"
                raise ShardError(
                    f"{self.name}: the command failed ({how}, after {self._arrived} bytes); its own words are in the "
                    "rank's log: mend the command or what it reads"
                )
        if problem is not None:
            raise problem

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
        del self._window[: position - self._start]  # nobody asks for what lies before
        self._start = position
        return bytes(self._window[:size])

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
