"""What scripts/first_contact.sh writes down of its items: one JSON line each, and in the end a table.

    python scripts/first_contact_lines.py add LINES LOG NAME EXIT_CODE SECONDS COMMAND
    python scripts/first_contact_lines.py run RUN_DIR
    python scripts/first_contact_lines.py summary LINES MARKDOWN SECONDS

Needs Python alone.  A line keeps what the item printed as JSON ("records") and as Markdown tables ("tables"), and the
last lines of an item that failed.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

TIMED_OUT = (124, 137)  # exit codes of timeout(1)
LAST_LINES, LAST_CHARACTERS = 25, 4_000
SHOWN_CHARACTERS = 11_000  # of the summary on the terminal


def record_of(log: str, name: str, code: str, seconds: int, command: str) -> dict[str, Any]:
    """The JSON line of an item."""
    lines = log.splitlines()
    records = []
    for line in lines:
        if line.startswith("{"):
            try:
                records.append(json.loads(line))
            except ValueError:  # something else that begins so
                continue
    exit_code = None if code == "skipped" else int(code)
    state = "skipped" if exit_code is None else "timeout" if exit_code in TIMED_OUT else "failed" if exit_code else "ok"
    found: dict[str, Any] = {
        "item": name,
        "state": state,
        "exit_code": exit_code,
        "seconds": seconds,
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


def headline(line: dict[str, Any]) -> str:
    """What an item found, in one cell."""
    if line["state"] == "skipped":
        return "no time was left"
    if line["state"] != "ok":
        said = line["last_lines"].strip().splitlines()
        return (said or ["said nothing"])[-1][:200]
    if line["records"]:
        good = [record.get("good") for record in line["records"] if "good" in record]
        if good:
            return f"{sum(good)} of {len(good)} good"
        return json.dumps(line["records"][-1])[:300]
    rows = max(0, len(line["tables"]) - 2)
    return f"{rows} rows, below" if line["tables"] else line.get("said", "")[:200]


def summary(lines: list[dict[str, Any]], seconds: int) -> str:
    rows = [
        f"| {line['item']} | {line['state']} | {line['seconds']} | {headline(line).replace('|', '/')} |"
        for line in lines
    ]
    tables = [f"{line['item']}\n\n" + "\n".join(line["tables"]) for line in lines if line["tables"]]
    bad = sum(line["state"] != "ok" for line in lines)
    total = f"{len(lines)} items, {bad} of them not ok, {seconds} s"
    return "\n\n".join([*tables, "\n".join(["| item | | s | |", "|---|---|---|---|", *rows]), total])


def main(arguments: list[str]) -> int:
    match arguments:
        case ["add", lines, log, name, code, seconds, command]:
            text = Path(log).read_text(errors="replace")
            with open(lines, "a") as file:
                file.write(json.dumps(record_of(text, name, code, int(seconds), command)) + "\n")
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
