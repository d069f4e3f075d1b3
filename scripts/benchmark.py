"""This project's training step beside every other SwinV2: the official arithmetic, timm, transformers, torchvision.

    python scripts/benchmark.py [--cases tiny/256/8 ...] [--compile] [--quick]

Same weights, same images.  Before anything is timed, each contestant's logits and the gradient of the loss with respect
to the images are compared with the official arithmetic in float32, in evaluation mode, where stochastic depth is off.
Each contestant lives in a process of its own, which sleeps until its turn; they take turns one at a time, in
alternating order.  A turn is one training step that is not measured, then --steps that are: forward pass, backward pass
and AdamW with stochastic depth 0.1.  Ratios are medians over the rounds, each of two turns of the same round.

In bf16 every other implementation runs twice, under autocast and with its weights in bf16, and its faster is what ours
is compared with; ours has bf16 weights with float32 masters, as it is trained, with autocast beside it.
"Matrix products alone" are the products of the same step with nothing between them: the limit.
Packages that are absent are named in the tables.  Exit code 0 when every contestant that ran agreed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file

import torch

from scripts.benchmark_tables import Entry, Table, details, summary
from scripts.benchmark_worker import BOUNDS, Refused, Setting, Worker, compete, prepare
from scripts.contestants import PEERS, PRODUCTS, Case, Contestant
from swinv2_train.runtime import available_cores
from swinv2_train.runtime.cpu_speed import cpu_speed, slow_bf16
from swinv2_train.runtime.environment import version_of

ROOT = Path(__file__).resolve().parent.parent
CASES = {  # images per step on a CPU and on a GPU
    "tiny/256/8": (4, 128),
    "base/192/12": (2, 128),
    "base/256/16": (2, 64),
    "large/384/24": (1, 16),
    "giant/192/12": (1, 4),
}
PROCESS_GIB = {"cpu": 0.3, "cuda": 0.6}  # of every worker before it has weights
PACKAGES = ("torch", *PEERS, "triton", "swinv2_train")


def lines(paragraph: str) -> str:
    """As long as the project's documents have them."""
    return textwrap.fill(paragraph, 158, break_long_words=False, break_on_hyphens=False)


def say(line: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {line}", flush=True)


def case_of(text: str, batch_size: int | None, device: str) -> Case:
    """SIZE/PX/WINDOW.  Raises ValueError."""
    size, img_size, window_size = text.split("/")
    usual = CASES.get(text, (1, 1))[device == "cuda"]
    case = Case(size, int(img_size), int(window_size), batch_size or usual)
    case.meta_model()
    return case


def contestants(precision: str, options: argparse.Namespace) -> Iterator[Contestant]:
    """The rows of a table, but for those in our process settings."""
    ways = {"fp32": ("fp32",), "bf16": ("bf16", "autocast")}[precision]
    for way in ways:
        yield Contestant("ours", way)
    if not options.quick:
        yield Contestant("ours", ways[0], compiled=True)
    for implementation in ("official", *PEERS):
        for compiled in (False, True) if options.compile else (False,):
            for way in ways:
                yield Contestant(implementation, way, compiled)
    yield Contestant(PRODUCTS, ways[0])


def absent(contestant: Contestant, case: Case) -> str | None:
    """Why a contestant cannot even be asked."""
    name = contestant.implementation
    if name in PEERS and importlib.util.find_spec(name) is None:
        return f"{name} is not installed"
    if name in PEERS and case.meta_model().extra_norm_period:
        return f"{name} has no place for the extra norms of huge and giant"
    return None


def too_large(case: Case, rows: Sequence[Contestant], device: torch.device) -> str | None:
    """Why a table does not fit into memory: all weights between turns, and one contestant's step."""
    float32_gib = case.weights_gib()
    at_rest = sum(float32_gib * row.weights_dtype.itemsize / 4 for row in rows if row.implementation != PRODUCTS)
    at_rest += PROCESS_GIB[device.type] * len(rows)
    step = 3.5 * case.weights_gib() + case.activations_gib()  # gradients, two moments, autocast's copies
    needed = at_rest + step
    free = _free_gib(device)
    return f"needs about {needed:.0f} GiB, {free:.0f} are free (--only, --batch-size)" if needed > free else None


def _free_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:"))


class Running:
    """The workers of a table, from the first to the last turn."""

    def __init__(self, setting: Setting, precision: str) -> None:
        self.table = Table(setting.case, precision)
        self.steps_sec: dict[Contestant, list[float]] = {}
        """For each contestant that is ready, the seconds of the first step, which compiles, and of the second."""
        self._setting = setting
        self._workers: list[tuple[Entry, Worker]] = []

    def enter(self, contestant: Contestant) -> None:
        """Start a contestant, or note why it is left out."""
        entry = Entry(contestant, failed=absent(contestant, self.table.case))
        self.table.entries.append(entry)
        told = f"left out: {entry.failed}"
        if entry.failed is None:
            worker = Worker(compete, contestant, self._setting)
            self._workers.append((entry, worker))
            try:
                ready = worker.answer()
            except Refused as error:
                self._leave_out(entry, worker, error)
                told = f"left out: {error}"
            else:
                entry.difference = ready["difference"]
                first, second = self.steps_sec[contestant] = ready["steps_sec"]
                entry.compile_sec = first - second if contestant.compiled else None
                told = f"ready, a step takes {second:.2f} s"
        self._say(f"{contestant.name}, {contestant.precision}: {told}")

    def round(self, number: int, steps: int) -> None:
        """One turn of everyone, in this or, in every other round, the opposite order."""
        for entry, worker in self._workers[:] if number % 2 == 0 else self._workers[::-1]:
            others = [other for _, other in self._workers if other is not worker]
            idle, begin = sum(other.cpu_seconds() for other in others), time.perf_counter()
            try:
                entry.add(worker.turn(steps))
            except Refused as error:
                self._leave_out(entry, worker, error)
            self.table.turns_sec += time.perf_counter() - begin
            self.table.idle_cpu_sec += sum(other.cpu_seconds() for other in others) - idle
        self._say(f"round {number + 1} done")

    def close(self) -> None:
        """End all workers."""
        for _, worker in self._workers:
            worker.close()

    def _leave_out(self, entry: Entry, worker: Worker, error: Refused) -> None:
        entry.failed, entry.rounds = str(error), []
        self._workers.remove((entry, worker))
        worker.close()

    def _say(self, what: str) -> None:
        say(f"{self.table.case.name} {self.table.precision}: {what}")


def run_table(setting: Setting, precision: str, rows: Sequence[Contestant], options: argparse.Namespace) -> Table:
    running = Running(setting, precision)
    try:
        for row in rows:
            running.enter(row)
        for row in tuned_rows(running.steps_sec):
            running.enter(row)
        for number in range(options.rounds):
            running.round(number, options.steps)
    finally:
        running.close()
    return running.table


def tuned_rows(steps_sec: dict[Contestant, list[float]]) -> Iterator[Contestant]:
    """The official arithmetic and the fastest peer, by the second step, once more with the process settings that ours
    has: so it is seen how much of our speed is theirs.
    """
    for implementations in (("official",), PEERS):
        candidates = [row for row in steps_sec if row.implementation in implementations and not row.compiled]
        if candidates:
            yield replace(min(candidates, key=lambda row: steps_sec[row][1]), tuned=True)


def instruction_set() -> str:
    """The widest that torch uses here: AVX2, AVX512, ..."""
    return torch.backends.cpu.get_cpu_capability()


def machine(options: argparse.Namespace) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    found: dict[str, Any] = {"cpu": f"{cpu} ({instruction_set()})", "threads": options.threads}
    if options.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            found[package] = version_of(package) or "not installed"  # ours may be a bare checkout
    return found


def write(out: Path, tables: Sequence[Table], about: dict[str, Any]) -> None:
    """The Markdown, and beside it all numbers as JSON."""
    spoken = [f"{name} {value}" for part in ("machine", "versions") for name, value in about[part].items()]
    parts = [
        f"# Training speed beside other implementations of SwinV2 ({about['date']})",
        f"    {about['command']}",
        lines(
            f"{', '.join(spoken)}. {about['rounds']} rounds of {about['steps']} steps; {about['seconds']:.0f} s in all."
        ),
        lines(
            'Seconds are medians; "x" is how many times the other\'s speed. Outputs agree with the official arithmetic '
            f"in float32 within {BOUNDS['fp32']:g} in fp32 and {BOUNDS['bf16']:g} in bf16 (norms of logits and of the "
            "images' gradient). What each row is: `python scripts/benchmark.py --help`."
        ),
        "## Ours beside the others",
        summary(tables),
        "## Everyone",
        *(details(table) for table in tables if table.skipped is None),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    content = {**about, "tables": [table.as_json() for table in tables]}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=("cuda", "cpu"))
    parser.add_argument(
        "--cases", nargs="+", help=f"SIZE/PX/WINDOW; default on a CPU the first three of {', '.join(CASES)}"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), help="default: both, where the processor has bf16 units"
    )
    parser.add_argument("--only", nargs="+", choices=("ours", "official", *PEERS, PRODUCTS), help="these rows alone")
    parser.add_argument("--batch-size", type=int, help="images per step; default: by case and device")
    parser.add_argument("--rounds", type=int, help="turns of everyone; default 4")
    parser.add_argument("--steps", type=int, help="measured steps of a turn; default 2 on a CPU, 20 on a GPU")
    parser.add_argument("--threads", type=int, default=available_cores(), help="CPU threads; default: all cores")
    parser.add_argument("--compile", action="store_true", help="also the others under torch.compile (minutes on a CPU)")
    parser.add_argument("--quick", action="store_true", help="one round of tiny in fp32, nothing compiled")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: benchmarks/speed_DEVICE_YYYYMM.md, on CPUs for each instruction set; none for --quick",
    )
    options = parser.parse_args(arguments)
    usual = {
        "rounds": 1 if options.quick else 4,
        "steps": 20 if options.device == "cuda" else 1 if options.quick else 2,
    }
    only_fp32 = options.quick or (options.device == "cpu" and slow_bf16(cpu_speed()) is not None)
    usual["precisions"] = ["fp32"] if only_fp32 else ["fp32", "bf16"]
    usual["cases"] = list(CASES)[: 1 if options.quick else 3 if options.device == "cpu" else None]
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.quick and options.batch_size is None:
        options.batch_size = 1
    try:
        options.cases = [case_of(text, options.batch_size, options.device) for text in options.cases]
    except ValueError as error:
        parser.error(f"--cases: {error}; write SIZE/PX/WINDOW, as in tiny/256/8")
    if options.out is None and not options.quick:
        which = options.device if options.device == "cuda" else f"cpu_{instruction_set().lower()}"
        options.out = ROOT / "benchmarks" / f"speed_{which}_{datetime.date.today():%Y%m}.md"
    return options


def main(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore otherwise
    options = options_of(arguments)
    device = torch.device(options.device)
    begin = time.perf_counter()
    about = {
        "command": " ".join(["python scripts/benchmark.py", *arguments]), "date": f"{datetime.date.today()}",
        "machine": machine(options), "versions": versions(), "rounds": options.rounds, "steps": options.steps,
    }  # fmt: skip
    tables: list[Table] = []
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(case, Path(folder), device, options.threads)
            for precision in options.precisions:
                rows = [
                    row
                    for row in contestants(precision, options)
                    if options.only is None or row.implementation in options.only
                ]
                skipped = too_large(case, [row for row in rows if absent(row, case) is None], device)
                if skipped is not None:
                    say(f"{case.name} {precision}: skipped: {skipped}")
                    tables.append(Table(case, precision, skipped=skipped))
                else:
                    if not any(Path(folder).iterdir()):
                        prepare_case(setting)
                    tables.append(run_table(setting, precision, rows, options))
                    print(f"\n{details(tables[-1])}\n", flush=True)
                about["seconds"] = time.perf_counter() - begin
                if options.out is not None:
                    write(options.out, tables, about)
    print(summary(tables))
    disagree = [
        entry.failed for table in tables for entry in table.entries if entry.failed and "differ" in entry.failed
    ]
    return 1 if disagree else 0


def prepare_case(setting: Setting) -> None:
    worker = Worker(prepare, setting)
    try:
        worker.answer()
    finally:
        worker.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and their files go too
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
