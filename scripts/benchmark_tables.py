"""What scripts/benchmark.py measured, as Markdown.

A ratio is the median over the rounds of (other's seconds / this one's seconds), both of the same round: how many times
the other's speed this one has.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scripts.benchmark_worker import LAPS
from scripts.contestants import PEERS, PRODUCTS, Case, Contestant

FORWARD, BOTH, STEP = LAPS


@dataclass
class Entry:
    """A contestant's results; rounds holds per round the median seconds of its steps, {"wall" or "cpu": {lap: s}}."""

    contestant: Contestant
    failed: str | None = None
    difference: float | None = None
    compile_sec: float | None = None
    peak_gib: float = 0.0
    rounds: list[dict[str, dict[str, float]]] = field(default_factory=list)

    def add(self, turn: dict[str, Any]) -> None:
        """Take in what a worker's turn gave."""
        steps = turn["steps"]
        self.rounds.append(
            {
                clock: {lap: statistics.median(step[clock][lap] for step in steps) for lap in LAPS}
                for clock in ("wall", "cpu")
            }
        )
        self.peak_gib = max(self.peak_gib, turn["peak_gib"])

    def seconds(self, lap: str, clock: str = "wall") -> float:
        return statistics.median(measured[clock][lap] for measured in self.rounds)

    def times_speed_of(self, other: Entry, lap: str, clock: str = "wall") -> float:
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(theirs[clock][lap] / ours[clock][lap] for ours, theirs in pairs)


@dataclass
class Table:
    """All contestants of one case in fp32 or bf16; skipped: why nothing was run.

    idle_cpu_sec: CPU time that others used during someone's turn, of turns_sec.
    """

    case: Case
    precision: str
    entries: list[Entry] = field(default_factory=list)
    skipped: str | None = None
    idle_cpu_sec: float = 0.0
    turns_sec: float = 0.0

    def fastest(self, implementations: Sequence[str], compiled: bool = False) -> Entry | None:
        """By forward and backward pass; of a contestant with bf16 weights and autocast that is the better of both."""
        entries = [
            entry
            for entry in self.entries
            if entry.rounds
            and entry.contestant.implementation in implementations
            and entry.contestant.compiled == compiled
            and not entry.contestant.tuned
        ]
        return min(entries, key=lambda entry: entry.seconds(BOTH), default=None)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summary(tables: Sequence[Table]) -> str:
    """Ours beside official and best peer, and what the matrix products leave possible."""
    lines = [
        "| case | precision | ours | x official: forward | forward + backward | step | CPU time, forward + backward | "
        "x best peer: forward | forward + backward | step | CPU time, forward + backward | best peer | "
        "limit x official, forward + backward |",
        "|---" * 13 + "|",
    ]
    for table in tables:
        if table.skipped is not None:
            lines.append(f"| {table.case.name} | {table.precision} | skipped: {table.skipped} |" + " |" * 10)
        for compiled in (False, True):
            lines += _summary_row(table, compiled)
    return "\n".join(lines)


def _summary_row(table: Table, compiled: bool) -> Iterator[str]:
    ours, official = table.fastest(["ours"], compiled), table.fastest(["official"])
    if ours is None or official is None:
        return
    peers = [entry for entry in (table.fastest(PEERS), table.fastest(PEERS, True) if compiled else None) if entry]
    peer = min(peers, key=lambda entry: entry.seconds(BOTH), default=None)
    limit = table.fastest([PRODUCTS])
    cells = [table.case.name, table.precision, ours.contestant.name]
    for other in (official, peer):
        ratios = [ours.times_speed_of(other, lap) for lap in LAPS] if other else []
        ratios += [ours.times_speed_of(other, BOTH, "cpu")] if other else []
        cells += [f"{ratio:.2f}" for ratio in ratios] or [""] * 4
    cells += [f"{peer.contestant.name}, {peer.contestant.precision}" if peer else "none there"]
    cells += [f"{limit.times_speed_of(official, BOTH):.2f}" if limit else ""]
    yield f"| {' | '.join(cells)} |"


def details(table: Table) -> str:
    """Every contestant of a table."""
    columns = [
        "", "precision", "forward, s", "forward + backward, s", "step, s", "CPU time, forward + backward, s",
        "images/s, step", "x official: forward", "forward + backward", "step", "CPU time, forward + backward",
        "x best peer: forward + backward", "step", "peak, GiB", "difference", "compilation, s",
    ]  # fmt: skip
    lines = [f"### {table.case.name}, {table.precision}, {table.case.batch_size} images a step", ""]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    official, peer = table.fastest(["official"]), table.fastest(PEERS)
    for entry in table.entries:
        first = [entry.contestant.name, entry.contestant.precision]
        if entry.failed is not None:
            lines.append(f"| {' | '.join(first)} | left out: {entry.failed} |" + " |" * (len(columns) - 3))
            continue
        cells = first + [f"{entry.seconds(lap):.3f}" for lap in LAPS] + [f"{entry.seconds(BOTH, 'cpu'):.3f}"]
        cells += [f"{table.case.batch_size / entry.seconds(STEP):.2f}"]
        cells += [f"{entry.times_speed_of(official, lap):.2f}" if official else "" for lap in LAPS]
        cells += [f"{entry.times_speed_of(official, BOTH, 'cpu'):.2f}" if official else ""]
        cells += [f"{entry.times_speed_of(peer, lap):.2f}" if peer else "" for lap in (BOTH, STEP)]
        cells += [f"{entry.peak_gib:.2f}", "" if entry.difference is None else f"{entry.difference:.1e}"]
        cells += ["" if entry.compile_sec is None else f"{entry.compile_sec:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
