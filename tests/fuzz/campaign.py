"""Run every target for a while, count, and say what got through: `python -m tests.fuzz.campaign --seconds 3600`.

Inputs are tried in processes of their own: one that dies, hangs or grows is a failure like any other, and the input
that did it is kept.  The same seed tries the same inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swinv2_train.config import ConfigError
from swinv2_train.config.shown import shown
from tests.fuzz.mutation import mutated
from tests.fuzz.target import Target
from tests.fuzz.targets import targets

LONGEST_SEC = 10
"""Of the processor, for one input."""
HANG_SEC = 120
"""Of the clock: the machine may be busy with other work."""
MOST_BYTES = 2**30
"""Of memory, beyond what the process has when it begins."""
MOST_CHARACTERS = 6100
"""Of a message."""
_BATCH = 64
_WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
_NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo")
_ALARM, _REFUSED, _DONE = 250, 1, 0


@dataclass
class Count:
    """What became of a target's inputs."""

    accepted: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        return self.accepted + self.refused + len(self.failures)


class Watch:
    """Python's audit events of one input: what it opens, removes, starts or connects to outside of its folder."""

    def __init__(self, outside: Path) -> None:
        self.folder: str | None = None
        self.secret = str(outside)
        self.found: list[str] = []
        sys.addaudithook(self._hook)  # for as long as the process lives

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in _NEVER:
            self.found.append(f"{event} {arguments!r:.200}")
        elif event == "open":
            path, mode, flags = arguments
            if not isinstance(path, str | bytes | os.PathLike):
                return
            path = os.fsdecode(path)
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if path == self.secret or (writes and not self._inside(path)):
                self.found.append(f"open {path!r:.200} {mode}")
        elif (
            event in _WRITES
            and isinstance(arguments[0], str | bytes | os.PathLike)
            and not self._inside(os.fsdecode(arguments[0]))
        ):
            self.found.append(f"{event} {arguments!r:.200}")

    def _inside(self, path: str) -> bool:
        assert self.folder is not None
        full = os.path.realpath(path)
        return full.startswith((self.folder + os.sep, "/dev/null")) or full == self.folder


def try_batch(target: Target, seed: int, first: int, outside: Path, failures: Path | None) -> Count:
    """Inputs first .. first + _BATCH - 1 of a target, in processes of their own."""
    count, begin = Count(), first
    while begin < first + _BATCH:
        progress = mmap.mmap(-1, 16)  # number of the input under way, and how many were refused
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(target, seed, begin, first + _BATCH, outside, progress, writer)
        os.close(writer)
        with open(reader, "rb") as pipe:
            said = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        number, refused = struct.unpack("<QQ", progress[:16])
        finished = status == 0
        count.refused += refused
        count.accepted += (first + _BATCH if finished else number) - begin - refused
        if finished:
            break
        how = {
            -signal.SIGPROF: f"took more than {LONGEST_SEC} s", -signal.SIGALRM: f"did not end in {HANG_SEC} s",
        }.get(status, f"ended the process ({status})")  # fmt: skip
        text = said.decode(errors="replace") or how
        count.failures.append(f"{target.name}: input {number} of seed {seed}: {text[-3000:]}")
        if failures is not None:
            failures.mkdir(parents=True, exist_ok=True)
            name = f"{target.name.replace(' ', '_').replace(':', '').replace('/', '_')}_{seed}_{number}"
            (failures / name).write_bytes(input_of(target, seed, number, outside))
        begin = number + 1
    return count


def input_of(target: Target, seed: int, number: int, outside: Path) -> bytes:
    """An input by its number; the first ones are the seeds themselves."""
    if number < len(target.seeds):
        return target.seeds[number]
    draw = random.Random(f"{seed} {target.name} {number}")
    return mutated(draw, target.seeds, target.tokens, str(outside).encode())


def _child(
    target: Target, seed: int, begin: int, end: int, outside: Path, progress: mmap.mmap, writer: int
) -> None:  # never returns
    """Try the inputs; a failure is written to the pipe, and ends the process."""
    try:
        warnings.simplefilter("ignore")
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + MOST_BYTES, pages + MOST_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        watch = Watch(outside)
        before = outside.stat().st_mtime_ns, outside.read_bytes()
        refused = 0
        root = Path(tempfile.mkdtemp(prefix="fuzz-", dir=outside.parent))
        for number in range(begin, end):
            progress[:16] = struct.pack("<QQ", number, refused)
            data = input_of(target, seed, number, outside)
            place = root / "place"
            place.mkdir()
            signal.setitimer(signal.ITIMER_PROF, LONGEST_SEC)
            signal.setitimer(signal.ITIMER_REAL, HANG_SEC)
            watch.folder = os.path.realpath(place)
            try:
                target.run(data, place)
            except ConfigError as error:
                refused += 1
                message = str(error)
                assert len(message) <= MOST_CHARACTERS, f"a message of {len(message)} characters"
                assert shown(message, len(message), lines=True) == message, f"a message that acts: {message!r}"
                assert number >= len(target.seeds), f"a sound file was refused: {message}"
            finally:
                watch.folder = None
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert not watch.found, f"outside of its folder: {watch.found}"
            assert (outside.stat().st_mtime_ns, outside.read_bytes()) == before, "a file outside was changed"
            names = {path.name for path in outside.parent.iterdir() if not path.name.startswith("fuzz-")}
            assert names == {outside.name}, f"files outside: {names}"
            shutil.rmtree(place)
        progress[:16] = struct.pack("<QQ", end, refused)
        shutil.rmtree(root)
        os._exit(_DONE)
    except BaseException:  # noqa: BLE001  whatever it is, it is what is looked for
        with contextlib.suppress(BaseException):
            os.write(writer, traceback.format_exc()[-6000:].encode(errors="replace"))
        os._exit(_ALARM)


def campaign(chosen: Sequence[Target], seconds: float, seed: int, failures: Path | None = None) -> dict[str, Count]:
    """Try the targets in turn until the time is over, each at least once."""
    counts = {target.name: Count() for target in chosen}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="swinv2-fuzz-") as folder:
        outside = Path(folder) / "precious"
        outside.write_bytes(b"nobody reads or writes this")
        rounds = dict.fromkeys(counts, 0)
        while True:
            target = min(chosen, key=lambda each: counts[each.name].seconds)  # the same time for all
            if rounds[target.name] and time.monotonic() - started > seconds:
                return counts
            begun = time.monotonic()
            made = try_batch(target, seed, rounds[target.name] * _BATCH, outside, failures)
            total = counts[target.name]
            total.seconds += time.monotonic() - begun
            rounds[target.name] += 1
            total.accepted += made.accepted
            total.refused += made.refused
            total.failures += made.failures


def table(counts: dict[str, Count]) -> str:
    """What was tried, for people and for benchmarks/."""
    lines = ["| target | tried | accepted | refused in one message | failures | s |", "|---|---:|---:|---:|---:|---:|"]
    for name, count in counts.items():
        numbers = (
            f"{count.tried:,} | {count.accepted:,} | {count.refused:,} | {len(count.failures)} | {count.seconds:.0f}"
        )
        lines.append(f"| {name} | {numbers} |")
    totals = [sum(getattr(count, what) for count in counts.values()) for what in ("tried", "accepted", "refused")]
    failed = sum(len(count.failures) for count in counts.values())
    seconds = sum(count.seconds for count in counts.values())
    lines.append(f"| all | {totals[0]:,} | {totals[1]:,} | {totals[2]:,} | {failed} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name begins so")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="where inputs that fail are kept")
    parser.add_argument("--json", type=Path, help="write the counts there too")
    options = parser.parse_args()
    chosen = [target for target in targets() if target.name.startswith(options.only)]
    counts = campaign(chosen, options.seconds, options.seed, options.failures)
    print(table(counts))
    problems = [problem for count in counts.values() for problem in count.failures]
    for problem in problems[:20]:
        print("\n" + problem, file=sys.stderr)
    if options.json:
        rows = {name: {"tried": count.tried, "failures": count.failures} for name, count in counts.items()}
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
