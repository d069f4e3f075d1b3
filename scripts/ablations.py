"""The paper's ablations at a size for two CPU cores: SwinV2's blocks and position bias beside what they replaced.

    python scripts/ablations.py [--data data/cifar10] [--out runs/ablations] [--seeds 3]

Question "blocks" (arXiv:2111.09883 section 3.2, figure 2, table 6): res-post-norm and scaled cosine attention beside
V1's pre-norm and dot-product attention, in the same deep, narrow Swin: how far do activations grow with depth, and what
does a high learning rate do?  Question "windows" (section 3.3, table 1): the log-spaced continuous position bias beside
the linearly spaced one and V1's table, interpolated bicubically, when images and windows grow without fine-tuning.

CIFAR-10 as scripts/fetch_cifar10.py packs it.  Every run trains on one thread; --processes of them run at a time.  The
result of each is kept in --out, so the command run again goes on where it was stopped; a run whose settings have
changed is done again.  Writes RESULTS.md, RESULTS.json and two pictures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file

from scripts.ablation_results import BIASES, BLOCKS, write
from scripts.ablation_training import Recipe, Run, pack_images, train
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_STOPPED
from swinv2_train.runtime import available_cores, environment_record
from swinv2_train.storage.atomic import replace_text

ROOT = Path(__file__).resolve().parent.parent
LRS = (1e-3, 8e-3)
"""Question "blocks": the default of this package's classifiers, and eight times as much."""
WINDOWS_LR = 3e-3
RECIPES = {
    "blocks": Recipe(
        img_size=32, patch_size=4, embed_dim=32, depths=(2, 18), num_heads=(1, 2), window_size=4, crop_scale=(0.6, 1.0),
        batch_size=128, steps=150, warmup_steps=20, clip_grad_norm=0.0, table_lr_scale=1.0, eval_sizes=(),
    ),
    "windows": Recipe(
        img_size=32, patch_size=4, embed_dim=64, depths=(4, 2), num_heads=(8, 16), window_size=8, batch_size=64,
        crop_scale=(0.08, 1.0), steps=5000, warmup_steps=60, clip_grad_norm=5.0, table_lr_scale=30.0,
        eval_sizes=((32, 8), (48, 12), (64, 16)),
    ),
}  # fmt: skip


def say(line: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {line}", flush=True)


def plan(seeds: int, questions: Sequence[str]) -> Iterator[Run]:
    """All runs, a seed at a time."""
    for seed in range(seeds):
        if "blocks" in questions:
            for lr in LRS:
                for norm, attention in BLOCKS:
                    yield Run("blocks", norm, attention, "log", lr, seed, RECIPES["blocks"])
        if "windows" in questions:
            for bias in BIASES:
                yield Run("windows", "res-post-norm", "cosine", bias, WINDOWS_LR, seed, RECIPES["windows"])


def kept(run: Run, out: Path) -> dict[str, Any] | None:
    """The result of an earlier call; None where there is none of these settings."""
    path = out / f"{run.name}.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result["run"] == json.loads(json.dumps(asdict(run))) else None


def run_all(runs: Sequence[Run], out: Path, images: Path, processes: int) -> list[dict[str, Any]]:
    """The results of all runs in their order, from the folder or made now."""
    missing = [run for run in runs if kept(run, out) is None]
    say(f"{len(runs) - len(missing)} of {len(runs)} runs are in {out}")
    executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _ignore_interrupts)
    try:
        waiting: dict[Future[dict[str, Any]], Run] = {executor.submit(train, run, images): run for run in missing}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                run, result = waiting.pop(future), future.result()
                replace_text(out / f"{run.name}.json", json.dumps(result, allow_nan=False) + "\n")
                say(f"{run.name}: {_told(result)}; {len(waiting)} to go")
    finally:
        for process in list((executor._processes or {}).values()) if waiting else []:
            process.terminate()
        executor.shutdown(cancel_futures=True)
    results = [kept(run, out) for run in runs]
    return [result for result in results if result is not None]


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers


def _told(result: dict[str, Any]) -> str:
    last = result["losses"][-1]
    scores = ", ".join(f"{size} {score['top1']:.2f} %" for size, score in result["scores"].items())
    loss = "diverged" if last is None else f"loss {last:.3f}"
    return f"{loss}, {scores or 'amplitude ' + format(result['amplitudes']['end'][-1], '.2f')}, " \
           f"{result['images'] / result['train_cpu_sec']:.0f} images/s of CPU time"  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="folder of the shards (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of the runs (%(default)s)")
    parser.add_argument("--results", type=Path, help="default: benchmarks/ablations_cpu_YYYYMM, without ending")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (%(default)s)")
    parser.add_argument("--processes", type=int, default=available_cores(), help="runs at a time; default: all cores")
    parser.add_argument("--only", nargs="+", choices=tuple(RECIPES), default=list(RECIPES), help="default: both")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the workers end with this process
    results_path = options.results or ROOT / "benchmarks" / f"ablations_cpu_{datetime.date.today():%Y%m}"
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    images = pack_images(options.out, options.data)
    results = run_all(list(plan(options.seeds, options.only)), options.out, images, options.processes)
    say(f"all runs are done, {time.perf_counter() - began:.0f} s in this call")
    environment = environment_record(1)
    about = {
        "command": " ".join(["python scripts/ablations.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": f"{datetime.date.today()}",
        "cpu": environment["cpu"],
        "versions": {name: environment["versions"][name] for name in ("python", "torch")},
    }
    for path in write(results_path, results, about):
        say(f"wrote {path}")
    return EXIT_DONE


if __name__ == "__main__":
    try:
        sys.exit(guarded(main))
    except KeyboardInterrupt:
        sys.exit(EXIT_STOPPED)
