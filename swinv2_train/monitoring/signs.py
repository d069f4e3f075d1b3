"""Signs of life: where each rank's last one is, what it says, and of which rank a run that hangs is waiting."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from swinv2_train.config import ConfigError
from swinv2_train.config.shown import shown
from swinv2_train.storage.json_files import choice, number, optional, read_json, record, text, whole

STATUS = "status.json"
HEALTH = "health"
MOST_SIGN_BYTES = 2**20
"""The most that a sign of life or a status may hold; the reason in it may be a list of what each rank said."""
SIGN_FIELDS = {
    "host": text(300), "pid": whole(0, 2**31), "state": choice("running", "done", "stopped", "failed"),
    "reason": optional(text(2**20)), "doing": text(300), "doing_since": number(), "step": whole(),
    "updated_at": number(),
}  # fmt: skip
"""What every sign of life says, and the status too."""
_SIGN = record({**SIGN_FIELDS, "rank": whole(0, 2**20), "moves": whole(), "place": optional(text(10_000))})


def rank_file(run_dir: Path, rank: int) -> Path:
    """Where a rank's last sign of life is."""
    return run_dir / HEALTH / f"rank_{rank:05d}.json"


def rank_files(run_dir: Path) -> list[Path]:
    """The files of all ranks' last signs of life, in order."""
    named = (run_dir / HEALTH).glob("rank_*.json")
    return sorted(path for path in named if re.fullmatch(r"rank_[0-9]{5,8}", path.stem))


def read_ranks(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Each rank's last sign of life; one that is just being written is read again."""
    found: dict[int, dict[str, Any]] = {}
    unread = rank_files(run_dir)
    for pause_sec in (0.0, 0.02, 0.02):
        time.sleep(pause_sec)
        torn = []
        for path in unread:
            try:
                sign = read_json(path, MOST_SIGN_BYTES, _SIGN)
                found[sign["rank"]] = sign
            except (OSError, ConfigError):
                torn.append(path)
        unread = torn
        if not unread:
            break
    return dict(sorted(found.items()))


def silent_ranks(everyone: Mapping[int, Mapping[str, Any]], world_size: int, now: float, after_sec: float) -> list[int]:
    """Ranks of which nothing was heard for after_sec seconds before now."""
    heard = {rank: sign["updated_at"] for rank, sign in everyone.items()}
    return [rank for rank in range(world_size) if now - heard.get(rank, 0.0) > after_sec]


def diagnose_hang(everyone: Mapping[int, Mapping[str, Any]], world_size: int, now: float, silent_sec: float) -> str:
    """Which ranks a run that hangs waits for, in words.

    Ranks of which nothing is heard; else ranks that have done the least; else ranks that are elsewhere than most; else
    where all are, one for each place.
    """
    silent = silent_ranks(everyone, world_size, now, silent_sec)
    if silent:
        return "; ".join(_silence(rank, everyone.get(rank), now) for rank in silent[:8])
    fewest = min(sign["moves"] for sign in everyone.values())
    behind = [rank for rank, sign in everyone.items() if sign["moves"] == fewest]
    if len(behind) == world_size:
        places = [sign["place"] for sign in everyone.values()]
        usual = max(set(places), key=places.count)
        behind = [rank for rank, sign in everyone.items() if sign["place"] != usual]
        if not 0 < len(behind) < places.count(usual):
            firsts: dict[str | None, Mapping[str, Any]] = {}
            for sign in everyone.values():
                firsts.setdefault(sign["place"], sign)
            return "; ".join(f"{_who(sign)} is {_where(sign, now)}" for sign in list(firsts.values())[:8])
    return "; ".join(f"{_who(everyone[rank])} is behind: {_where(everyone[rank], now)}" for rank in behind[:8])


def _who(sign: Mapping[str, Any]) -> str:
    return f"rank {sign['rank']} (pid {sign['pid']} on {shown(sign['host'])})"


def _where(sign: Mapping[str, Any], now: float) -> str:
    return f"{shown(sign['doing'])} for {now - sign['doing_since']:.0f} s, in {sign['place'] or 'an unknown place'}"


def _silence(rank: int, sign: Mapping[str, Any] | None, now: float) -> str:
    if sign is None:
        return f"rank {rank} gave no sign of life at all"
    state = process_state(sign["pid"]) if sign["host"] == socket.gethostname() else None
    return (
        f"{_who(sign)} has given no sign of life for {now - sign['updated_at']:.0f} s"
        f"{f' ({state})' if state else ''}; then it was {shown(sign['doing'])}"
    )


def thread_location(frames: Sequence[FrameType]) -> str | None:
    """Where a thread is, in words: its innermost frame, and the innermost one of our own.  frames: innermost first."""

    def text(frame: FrameType) -> str:
        return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"

    if not frames:
        return None
    package = str(Path(__file__).parents[1])
    own = next((frame for frame in frames if frame.f_code.co_filename.startswith(package)), frames[0])
    return text(frames[0]) if own is frames[0] else f"{text(frames[0])} (from {text(own)})"


_PROCESS_STATES = {
    "T": "it is stopped", "t": "a debugger holds it", "D": "it waits for a disk or a driver", "Z": "it has ended",
    "X": "it has ended", "R": "it computes", "S": "it sleeps",
}  # fmt: skip


def process_state(pid: int) -> str:
    """What the kernel says of a process of this host, in words."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return _PROCESS_STATES["X"] if Path("/proc/self").exists() else "unknown"
    except OSError:
        return "unknown"
    return _PROCESS_STATES.get(letter, letter)


def process_ended(pid: int) -> bool:
    """True when the kernel knows that a process of this host is no more."""
    return process_state(pid) == _PROCESS_STATES["X"]


def child_processes() -> list[int]:
    """Processes that this one started (data workers), where the kernel tells."""
    found: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, path.read_text().split())
    return sorted(found)
