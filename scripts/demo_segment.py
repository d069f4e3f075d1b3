"""Does pre-training pay for segmentation?  Composed scenes, a tenth of their labels, from SimMIM weights and from none.

    make demo-segment                                   # or: python scripts/demo_segment.py
    make demo-segment DEMO_ARGS="--seeds 1 train.epochs=2"   # a key of one task goes to its runs alone

Scenes are composed of real photographs (scripts/compose_scenes.py).  One SimMIM pre-training sees all training scenes
without labels; then UPerNet trains on a tenth of them, twice each way (another seed: other weights, order and views),
and is scored on the test scenes, whose garments and photographs no training scene has.  Two processes under torchrun.
Ctrl-C leaves complete checkpoints; run again, it goes on from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file

from torch.distributed.elastic.multiprocessing.api import SignalException

from scripts import compose_scenes
from scripts.demo import overrides_of, run_ranks
from swinv2_train.config.arguments import last_of_each
from swinv2_train.config.command_line import compose_overrides, guarded
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_STOPPED
from swinv2_train.monitoring.console import duration_text
from swinv2_train.monitoring.run_log import read_metrics

DATA_DIR = Path("data/scenes")
MODEL = (
    "model=tiny", f"model.img_size={compose_scenes.SIDE_PX}", "model.patch_size=2", "model.window_size=4",
    "model.embed_dim=32", "model.depths=[2,2,2,2]", "model.num_heads=[1,2,4,8]", "model.drop_path_rate=0.0",
    "engine=zero1", "engine.precision=fp32", "data.num_workers=0", "train.checkpoint_every_steps=200",
)  # fmt: skip
PRETRAIN = (
    "task=simmim", "task.mask_unit_px=8", "data=folder", "train.epochs=14", "train.global_batch_size=64",
    "train.micro_batch_size=32", "optim.lr=2e-3", "optim.schedule.warmup_epochs=1", "optim.schedule.warmup_lr=1e-6",
    "optim.schedule.min_lr=1e-5",
)  # fmt: skip
SEGMENT = (
    "task=segment", f"task.num_classes={len(compose_scenes.CLASSES)}", "task.reduce_zero_label=false",
    "task.head_channels=32", "task.aux_channels=16", f"task.resize_long_px={compose_scenes.SIDE_PX}",
    f"task.resize_short_px={compose_scenes.SIDE_PX}", "task.resize_scale=[0.9,1.25]", "task.photometric=false",
    "data=folder", "train.epochs=40", "train.global_batch_size=32", "train.micro_batch_size=16", "optim.lr=5e-3",
    "optim.schedule.warmup_steps=40", "optim.clip_grad_norm=5.0",
    f"task.class_names=[{','.join(compose_scenes.CLASSES)}]",
)  # fmt: skip
"""For a quarter of an hour on two cores, the same for both ways of training; chosen on held-out training scenes."""
LABELLED = "train-000000.tar"
"""A tenth of the training scenes."""
SCORES = ("val/miou", "val/macc", "val/aacc")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code of the first phase that does not end well, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-segment"), help="folder of the runs (%(default)s)")
    parser.add_argument("--data", type=Path, default=DATA_DIR, help="folder of the scenes (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="configuration overrides")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    phases = phases_of(options.runs, options.data, options.seeds, options.overrides)
    for _, command in phases.values():
        compose_overrides(command)  # wrong input is said before anything is fetched
    exit_code = compose_scenes.run(["--out", str(options.data)])
    if exit_code != EXIT_DONE:
        return exit_code
    found: dict[str, list[dict[str, float]]] = {}
    for run_dir, (title, command) in phases.items():
        print(f"\n{title} ({run_dir})", flush=True)
        exit_code = run_ranks(["-m", "swinv2_train.train", *command])
        if exit_code != EXIT_DONE:
            if exit_code == EXIT_STOPPED:
                print("stopped; `make demo-segment` goes on from there", flush=True)
            return exit_code
        if "task=segment" in command:
            found.setdefault(title.rpartition(",")[0], []).append(last_scores(run_dir))
    print(f"\n{table(found)}\n\nthis call took {duration_text(time.monotonic() - started)}")
    print(f"reports: {options.runs}/*/report.html")
    return EXIT_DONE


def phases_of(runs: Path, data: Path, seeds: int, overrides: Sequence[str]) -> dict[Path, tuple[str, list[str]]]:
    """The run directories in order, each with what is done there and the overrides of its command."""
    pretrain = runs / "pretrain"

    def command(run_dir: Path, task: str, *own: str) -> list[str]:
        return last_of_each([*MODEL, *own, f"run_dir={run_dir}", *overrides_of(overrides, task)])

    shards = f"data.shards={data}/train-*.tar"
    phases = {pretrain: ("SimMIM pre-training on all scenes", command(pretrain, "simmim", *PRETRAIN, shards))}
    labelled = (f"data.shards={data}/{LABELLED}", f"data.eval_shards={data}/test-*.tar")
    for seed in range(seeds):
        for way, init in (("from scratch", "null"), ("from SimMIM weights", str(pretrain))):
            run_dir = runs / f"{way.replace(' ', '-').lower()}-{seed}"
            own = (*SEGMENT, *labelled, f"seed={seed}", f"task.init_from={init}")
            phases[run_dir] = (f"{way}, seed {seed}", command(run_dir, "segment", *own))
    return phases


def last_scores(run_dir: Path) -> dict[str, float]:
    """What a run that is done measured of the test scenes at its end."""
    return next(line for line in reversed(read_metrics(run_dir)) if SCORES[0] in line)


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table of the scores, mean and spread over seeds, and what pre-training adds."""
    lines = [
        f"| trained on a tenth of the labels | runs | {' | '.join(name.removeprefix('val/') for name in SCORES)} |"
    ]
    lines.append("|---|---|" + "---|" * len(SCORES))
    for way, runs in found.items():
        cells = [_mean_and_spread([run[name] for run in runs]) for name in SCORES]
        lines.append(f"| {way} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_and_spread(values: list[float]) -> str:
    spread = f" (sd {stdev(values):.2f}; {', '.join(f'{value:.2f}' for value in values)})" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


if __name__ == "__main__":
    try:
        sys.exit(guarded(main))
    except (KeyboardInterrupt, SignalException):  # outside of a training phase nothing needs saving
        sys.exit(EXIT_STOPPED)
