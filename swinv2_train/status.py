"""``python -m swinv2_train.status RUN_DIR [--json]``: how a run is getting on, from the files that it keeps writing.

It needs the run directory alone, so it works on any host that sees it, while the run goes on and after its end.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import stoppable
from swinv2_train.config.exit_codes import EXIT_DONE
from swinv2_train.config.shown import MESSAGE_CHARACTERS, shown
from swinv2_train.data.class_names import listed, read_run_classes
from swinv2_train.monitoring.console import duration_text
from swinv2_train.monitoring.run_log import UNFINISHED, read_metrics
from swinv2_train.monitoring.signs import MOST_SIGN_BYTES, SIGN_FIELDS, STATUS, process_ended, read_ranks
from swinv2_train.runtime import read_environment
from swinv2_train.storage.json_files import flag, mapping, number, optional, read_json, record, text, whole

USAGE = """swinv2-status RUN_DIR [--json]

How a run is getting on: step, loss, speed, time left, last checkpoint, scores, what it does or waits for.
--json: all of it, and every rank's last sign of life, as one JSON object.
"""
_MISSED_BEATS = 4
"""How many signs of life must be missing before a rank counts as silent: a busy disk may swallow some."""
_WORTH_A_WORD_SEC = 5.0
_MOST_TEXT = 100_000


_FINITE = optional(number())
_STATUS = record(
    {**SIGN_FIELDS, "world_size": whole(1, 2**20), "heartbeat_sec": number(0)},
    may={
        **{name: optional(whole()) for name in ("total_steps", "checkpoint_step")},
        **dict.fromkeys(("loss", "images_per_sec", "seconds_left"), _FINITE),
        "attention": mapping(text(2000)),
        "outage": flag(),
        "slowest_rank": optional(
            record({"rank": whole(), "own_sec": number(), "data_wait_sec": number(), "median_sec": number()})
        ),
    },
)


def read_status(run_dir: Path) -> dict[str, Any]:
    """RUN_DIR/status.json with "state" as it is by now, "silent_sec", "classes" (the names of the model's), "compile"
    (what model.compile came to, and why) and "ranks", each with its own "silent_sec".

    state: running, done, stopped, failed, or lost (it should run, but no sign of life came for "silent_sec" seconds, or
    its process has ended).  silent_sec: since the last sign of life.  Raises ConfigError where there is no such file.
    """
    path = run_dir / STATUS
    try:
        status: dict[str, Any] = read_json(path, MOST_SIGN_BYTES, _STATUS, "it is written anew when the run goes on")
    except FileNotFoundError:
        what = "holds no status.json: no run has started there yet" if run_dir.is_dir() else "is no directory"
        raise ConfigError(f"run_dir ({run_dir}) {what}; name the directory of a run") from None
    now = time.time()
    patience = _MISSED_BEATS * status["heartbeat_sec"]
    ranks = [
        rank | {"silent_sec": now - rank["updated_at"], "lost": _lost(rank, patience)}
        for rank in read_ranks(run_dir).values()
    ]
    status["scores"] = latest_scores(run_dir)
    starts = read_environment(run_dir)
    status["compile"] = starts[-1].get("start", {}).get("compile") if starts else None
    status |= {"silent_sec": now - status["updated_at"], "ranks": ranks, "classes": read_run_classes(run_dir)}
    if status["state"] == "running" and _lost(status, patience):
        status["state"] = "lost"
    return status


def latest_scores(run_dir: Path) -> dict[str, float]:
    """The run's newest scores by name (val/..., val_ema/..., probe/...), and their "step"; empty before the first."""
    for line in reversed(read_metrics(run_dir)):
        found = {
            name: value
            for name, value in line.items()
            if name.startswith(("val/", "val_ema/", "probe/")) and name != UNFINISHED and isinstance(value, int | float)
        }
        if found:
            return {"step": line["step"], **found}
    return {}


def _scores_text(scores: Mapping[str, float]) -> str:
    """Top-1 and the others in words."""
    parts = []
    for name, value in scores.items():
        if name != "step":
            group, _, score = name.partition("/")
            words = score.replace("_", " ").replace("top1", "top-1").replace("top5", "top-5")
            whose = {"val": "", "val_ema": " of averaged weights"}.get(group, " of the frozen encoder")
            parts.append(f"{words}{whose} {value:.4g}" + (" %" if "top" in score else ""))
    return f"scores at step {scores['step']:.0f}: {', '.join(parts)}"


def _lost(sign: Mapping[str, Any], patience_sec: float) -> bool:
    """True for one who should be alive and is not."""
    if sign["state"] != "running":
        return False
    gone = sign["host"] == socket.gethostname() and process_ended(sign["pid"])
    return gone or time.time() - sign["updated_at"] > patience_sec


def status_text(status: Mapping[str, Any]) -> str:
    """The status for a person, a few lines."""
    lines = [_headline(status)]
    step, total = status["step"], status.get("total_steps")
    if total:
        parts = [f"step {step} of {total} ({100 * step / total:.1f} %)"]
        if status.get("loss") is not None:
            parts.append(f"loss {status['loss']:.4f}")
        if status.get("images_per_sec") is not None:
            parts.append(f"{status['images_per_sec']:,.4g} images/s")
        if status["state"] == "running" and status.get("seconds_left") is not None:
            parts.append(f"{duration_text(status['seconds_left'])} left")
        lines.append("  ".join(parts))
        saved = status.get("checkpoint_step")
        lines.append("no complete checkpoint yet" if saved is None else f"last complete checkpoint: step {saved}")
    if status.get("scores"):
        lines.append(_scores_text(status["scores"]))
    if status["compile"]:
        lines.append(f"compiled: {shown(status['compile'])}")
    if status["classes"]:
        lines.append(f"{len(status['classes'])} classes: {listed(status['classes'])}")
    if paths := status.get("attention"):
        lines.append(f"attention: {_paths_text(paths)}")
    slowest = status.get("slowest_rank")
    if slowest and status["world_size"] > 1:
        lines.append(
            f"slowest rank: {slowest['rank']}, {slowest['own_sec']:.3g} s of its own a step, "
            f"{slowest['data_wait_sec']:.3g} of them waiting for data (median of all {slowest['median_sec']:.3g})"
        )
    lines += [text for rank in status["ranks"] if (text := _rank_text(status, rank))]
    return "\n".join(lines)


def _paths_text(paths: Mapping[str, str]) -> str:
    """How the stages attend, in one word where all do alike."""
    same = len(set(paths.values())) == 1
    return next(iter(paths.values())) if same else "; ".join(f"{stage} {path}" for stage, path in paths.items())


def _headline(status: Mapping[str, Any]) -> str:
    where = f"{status['world_size']} ranks, rank 0 is pid {status['pid']} on {shown(status['host'])}"
    reason = f": {shown(status['reason'], MESSAGE_CHARACTERS, lines=True)}" if status["reason"] else ""
    ago = f"{duration_text(status['silent_sec'])} ago"
    if status["state"] == "running":
        return f"running: {_doing(status)} ({where})"
    if status["state"] == "lost":
        silent = f"no sign of life for {status['silent_sec']:.0f} s"
        return f"{silent}; then it was {shown(status['doing'])} ({where}); the same command resumes"
    again = " by an outage, after which the same command goes on" if status.get("outage") else ""
    return f"{status['state']} {ago}{again}{reason}"


def _doing(sign: Mapping[str, Any]) -> str:
    for_sec = sign["updated_at"] - sign["doing_since"]
    return shown(sign["doing"]) + (f" for {for_sec:.0f} s" if for_sec > _WORTH_A_WORD_SEC else "")


def _rank_text(status: Mapping[str, Any], rank: Mapping[str, Any]) -> str | None:
    """A line about a rank that is not as rank 0 is; None for all the others."""
    who = f"rank {rank['rank']} (pid {rank['pid']} on {shown(rank['host'])})"
    if rank["lost"] and rank["rank"]:
        return f"{who}: no sign of life for {rank['silent_sec']:.0f} s; then it was {shown(rank['doing'])}"
    if rank["reason"] and rank["reason"] != status["reason"]:
        return f"{who}: {rank['state']}: {shown(rank['reason'].splitlines()[0], MESSAGE_CHARACTERS)}"
    late = rank["updated_at"] - rank["doing_since"] > _WORTH_A_WORD_SEC
    if status["state"] == "running" and rank["doing"] != status["doing"] and late and not rank["lost"]:
        return f"{who}: {_doing(rank)}"
    return None


def run(arguments: list[str]) -> int:
    """Print the status that the arguments ask for; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return EXIT_DONE
    runs = [argument for argument in arguments if argument != "--json"]
    if len(runs) != 1 or runs[0].startswith("-"):
        raise ConfigError(f"name one run directory\n{USAGE.rstrip()}")
    status = read_status(Path(runs[0].removeprefix("run_dir=")))
    print(json.dumps(status, indent=1) if runs != arguments else shown(status_text(status), _MOST_TEXT, lines=True))
    return EXIT_DONE


def main() -> None:
    """The console script swinv2-status."""
    sys.exit(stoppable(lambda: run(sys.argv[1:])))


if __name__ == "__main__":
    main()
