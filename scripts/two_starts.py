"""Training from SimMIM weights beside training from scratch, over seeds: what the demos of segmentation and detection
share.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from scripts.demo import overrides_of, run_ranks
from swinv2_train.config.arguments import last_of_each
from swinv2_train.config.command_line import compose_overrides
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_STOPPED
from swinv2_train.monitoring.run_log import read_metrics

WAYS = ("from scratch", "from SimMIM weights")


@dataclass(frozen=True)
class Phase:
    """One training of a demo."""

    run_dir: Path
    title: str
    command: list[str]
    """Its overrides."""
    way: str | None = None
    """Of WAYS; None for a training that stands alone."""


def arguments_parser(description: str | None, runs: str, data: str) -> argparse.ArgumentParser:
    """The options of both demos.  runs, data: the default folders."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path(runs), help="folder of the runs (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path(data), help="folder of the data (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="configuration overrides")
    return parser


def phase(run_dir: Path, title: str, own: Sequence[str], overrides: Sequence[str], way: str | None = None) -> Phase:
    """own: of this training, task=NAME among them; overrides: the user's, those of other tasks are left out."""
    task = next(each for each in own if each.startswith("task=")).partition("=")[2]
    return Phase(run_dir, title, last_of_each([*own, f"run_dir={run_dir}", *overrides_of(overrides, task)]), way)


def both_ways(runs: Path, pretrain: Path, seeds: int, own: Sequence[str], overrides: Sequence[str]) -> list[Phase]:
    """As many trainings as seeds from nothing and from the run `pretrain`: only the initial weights differ."""
    found = []
    for seed in range(seeds):
        for way, init in zip(WAYS, ("null", str(pretrain)), strict=True):
            run_dir = runs / f"{way.replace(' ', '-').lower()}-{seed}"
            more = (*own, f"seed={seed}", f"task.init_from={init}")
            found.append(phase(run_dir, f"{way}, seed {seed}", more, overrides, way))
    return found


def check(phases: Sequence[Phase]) -> None:
    """Wrong input is said before anything is fetched.  Raises ConfigError."""
    for each in phases:
        compose_overrides(each.command)


def run_phases(phases: Sequence[Phase], make: str) -> int:
    """One after the other; returns the exit code of the first that does not end well, or 0.  make: how to go on."""
    for each in phases:
        print(f"\n{each.title} ({each.run_dir})", flush=True)
        exit_code = run_ranks(["-m", "swinv2_train.train", *each.command])
        if exit_code != EXIT_DONE:
            if exit_code == EXIT_STOPPED:
                print(f"stopped; `make {make}` goes on from there", flush=True)
            return exit_code
    return EXIT_DONE


def last_scores(run_dir: Path, score: str) -> dict[str, float]:
    """What a run that is done measured at its end: the last line that has this score."""
    return next(line for line in reversed(read_metrics(run_dir)) if score in line)


def scores_by_way(phases: Sequence[Phase], score: str) -> dict[str, list[dict[str, float]]]:
    """The last scores of each seed."""
    return {way: [last_scores(each.run_dir, score) for each in phases if each.way == way] for way in WAYS}


def table(heading: str, found: Mapping[str, Sequence[Mapping[str, float]]], scores: Sequence[str]) -> str:
    """A Markdown table of the scores, mean and spread over the runs of each row."""
    lines = [f"| {heading} | runs | {' | '.join(name.removeprefix('val/') for name in scores)} |"]
    lines.append("|---|---|" + "---|" * len(scores))
    for row, runs in found.items():
        cells = [_mean_and_spread([run[name] for run in runs]) for name in scores]
        lines.append(f"| {row} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" (sd {stdev(values):.2f}; {', '.join(f'{value:.2f}' for value in values)})" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"
