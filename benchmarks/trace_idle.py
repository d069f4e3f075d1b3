"""What the device did in a traced run: the kernels that took the most time, and the share in which none ran.

    python -m benchmarks.trace_idle RUN_DIR [--rows 25]

Reads the traces of runtime.profile=true (RUN_DIR/profile/*.json.gz).  Busy is the union of all kernels and copies of
all streams, idle the rest from the first to the last.  Prints a JSON line and a Markdown table for each trace; of a run
on a CPU, whose traces have no kernels, the operations of the main thread instead, each with what it calls.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def busy_us(spans: Iterable[tuple[float, float]]) -> float:
    """Microseconds in which at least one of the (start, end) runs."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def summary(events: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Span, busy and idle share; and the microseconds of every call, by name.  Raises ValueError where nothing is."""
    complete = [event for event in events if event.get("ph") == "X"]
    ran = [event for event in complete if event.get("cat") in ON_DEVICE]
    kind = "device"
    if not ran:
        ran, kind = [event for event in complete if event.get("cat") == "cpu_op"], "cpu"
    if not ran:
        raise ValueError("the trace holds neither kernels nor operations")
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in ran]
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    calls: dict[str, list[float]] = defaultdict(list)
    for event in ran:
        calls[event["name"]].append(event["dur"])
    busy = busy_us(spans)
    return {
        "of": kind,
        "span_ms": round(whole / 1000, 3),
        "busy_ms": round(busy / 1000, 3),
        "idle_share": round(1 - busy / whole, 4) if whole else 0.0,
        "launches": len(ran),
    }, calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--rows", type=int, default=25)
    options = parser.parse_args()
    traces = sorted((options.run_dir / "profile").glob("*.json.gz"))
    if not traces:
        print(f"{options.run_dir} holds no trace; run it with runtime.profile=true", file=sys.stderr)
        return 2
    for trace in traces:
        with gzip.open(trace, "rt") as file:
            found, calls = summary(json.load(file)["traceEvents"])
        print(json.dumps({"trace": trace.name, **found}))
        print("| kernel | calls | ms | share of busy |\n|---|---|---|---|")
        for name, taken in sorted(calls.items(), key=lambda item: -sum(item[1]))[: options.rows]:
            spent = sum(taken) / 1000
            shown = name.replace("|", "/")[:100]
            print(f"| `{shown}` | {len(taken)} | {spent:.3f} | {spent / found['busy_ms']:.1%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
