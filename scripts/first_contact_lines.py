"""Runs the items of scripts/first_contact.sh and writes down what they found: one JSON line each, in the end a table.

    python scripts/first_contact_lines.py item LINES LOG NAME SECONDS COMMAND...
    python scripts/first_contact_lines.py run RUN_DIR
    python scripts/first_contact_lines.py summary LINES MARKDOWN SECONDS

Needs Python alone.  A line keeps what the item printed as JSON ("records") and as Markdown tables ("tables"), and the
last lines of an item that failed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LEAST_SEC = 3  # an item with less left is not begun
ASKED_SEC, KILLED_SEC = 6.0, 2.0  # before its limit an item is asked to end, and killed
PR_SET_CHILD_SUBREAPER = 36
LAST_LINES, LAST_CHARACTERS = 25, 4_000
CELL_CHARACTERS = 300
SHOWN_CHARACTERS = 11_000  # of the summary on the terminal


def run_item(command: list[str], log: Path, limit: float) -> int | None:
    """The exit code of a command that writes to `log`; None where it did not end by itself.

    Returns before `limit` seconds are over, even if what was killed does not go away (a process that waits for a driver
    does not).  Nothing that it started outlives it: an orphan would keep the card's memory from the next item.
    """
    begin = time.monotonic()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of its processes become ours
    with open(log, "wb") as file:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            file.write(f"{error}\n".encode())
            return 127
    code = None
    kill_at = max(0.6 * limit, limit - KILLED_SEC)
    for at, number in ((max(0.3 * limit, limit - ASKED_SEC), signal.SIGTERM), (kill_at, signal.SIGKILL)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            ended = child.wait(max(0.0, begin + at - time.monotonic()))
            code = ended if number == signal.SIGTERM else None
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
    end_orphans(begin + limit - 0.2)
    return code


def end_orphans(until: float) -> None:
    """Kill and reap all children of this process, until none is left or time.monotonic() is `until`."""
    of_this_process = Path(f"/proc/self/task/{os.getpid()}/children")
    while children := (of_this_process.read_text().split() if of_this_process.exists() else []):
        for each in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(each), signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(each), os.WNOHANG)
        if time.monotonic() > until:
            return
        time.sleep(0.02)


def record_of(log: str, name: str, state: str, exit_code: int | None, seconds: float, command: str) -> dict[str, Any]:
    """The JSON line of an item; state: "ok", "failed", "timeout" or "skipped"."""
    lines = log.splitlines()
    records = []
    for line in lines:
        if line.startswith("{"):
            try:
                records.append(json.loads(line))
            except ValueError:  # something else that begins so
                continue
    found: dict[str, Any] = {
        "item": name,
        "state": state,
        "exit_code": exit_code,
        "seconds": round(seconds, 1),
        "command": command,
    }
    found |= {"records": records, "tables": [line for line in lines if line.startswith("|")]}
    if state != "ok":
        found["last_lines"] = "\n".join(lines[-LAST_LINES:])[-LAST_CHARACTERS:]
    elif not records and not found["tables"] and lines:
        found["said"] = lines[-1][:500]
    return found


def of_run(run_dir: Path) -> dict[str, Any]:
    """What a training's own files say: first and last loss, speed, MFU, memory, and how it ended."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"steps": lines[-1]["step"], "images": lines[-1]["images_seen"]}
    for key in ("train/loss", "perf/images_per_sec", "perf/step_sec", "perf/mfu", "data/wait_sec", "mem/peak_gib"):
        values = [line[key] for line in lines if line.get(key) is not None]
        if values:
            found[key] = {"first": values[0], "median": statistics.median(values), "last": values[-1]}
    for name in ("status.json", "environment.json"):
        if (run_dir / name).is_file():
            found[name] = json.loads((run_dir / name).read_text())
    return found


def shown(value: Any) -> str:
    """A value as the cell of a Markdown table."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "/").replace("\n", " ")[:CELL_CHARACTERS]


def table_of(records: list[dict[str, Any]]) -> list[str]:
    """Several records as the rows of one Markdown table, a column for every key that one of them has."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    rows = ([shown(record[key]) if key in record else "" for key in keys] for record in records)
    return [f"| {' | '.join(cells)} |" for cells in (keys, ["---"] * len(keys), *rows)]


def headline(line: dict[str, Any]) -> str:
    """What an item found, in one cell."""
    if line["state"] == "skipped":
        return "no time was left"
    records = line["records"]
    parts = []
    if line["state"] != "ok":
        parts.append((line["last_lines"].strip().splitlines() or ["said nothing"])[-1])
    judged = [record["good"] for record in records if "good" in record]
    if judged:
        parts.append(f"{sum(judged)} of {len(judged)} good")
    if len(records) == 1:
        parts.append(json.dumps(records[0]))
    elif records:
        parts.append(f"{len(records)} records, below")
    if line["tables"]:
        heads = sum(row.startswith("|---") for row in line["tables"])  # each below a row of names
        parts.append(f"{len(line['tables']) - 2 * heads} rows, below")
    return shown("; ".join(parts) or line.get("said", ""))


def summary(lines: list[dict[str, Any]], seconds: int) -> str:
    """All tables, several records of an item among them, and last what became of each item."""
    below = []
    for line in lines:
        blocks = [table_of(line["records"])] if len(line["records"]) > 1 else []
        blocks += [line["tables"]] if line["tables"] else []
        below += [f"{line['item']}\n\n" + "\n".join(block) for block in blocks]
    rows = [f"| {line['item']} | {line['state']} | {line['seconds']:g} | {headline(line)} |" for line in lines]
    bad = sum(line["state"] != "ok" for line in lines)
    total = f"{len(lines)} items, {bad} of them not ok, {seconds} s"
    return "\n\n".join([*below, "\n".join(["| item | | s | |", "|---|---|---|---|", *rows]), total])


def main(arguments: list[str]) -> int:
    match arguments:
        case ["item", lines, log, name, limit, *command]:
            begin, code = time.monotonic(), None
            Path(log).write_text("")
            state = "skipped"
            if int(limit) >= LEAST_SEC:
                code = run_item(command, Path(log), int(limit))
                state = "timeout" if code is None else "failed" if code else "ok"
            spent = time.monotonic() - begin
            text = Path(log).read_text(errors="replace")
            with open(lines, "a") as file:
                file.write(json.dumps(record_of(text, name, state, code, spent, " ".join(command))) + "\n")
        case ["run", run_dir]:
            print(json.dumps(of_run(Path(run_dir))))
        case ["summary", lines, markdown, seconds]:
            text = summary([json.loads(line) for line in Path(lines).read_text().splitlines()], int(seconds))
            Path(markdown).write_text(text + "\n")
            print(text[-SHOWN_CHARACTERS:])
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
