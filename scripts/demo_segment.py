"""Does pre-training pay for segmentation?  Composed scenes, a tenth of their labels, from SimMIM weights and from none.

    make demo-segment                                   # or: python scripts/demo_segment.py
    make demo-segment DEMO_ARGS="--seeds 1 train.epochs=2"   # a key of one task goes to its runs alone

Scenes are composed of real photographs (scripts/compose_scenes.py).  One SimMIM pre-training sees all training scenes
without labels; then UPerNet trains on a tenth of them, twice each way (another seed: other weights, order and views),
and is scored on the test scenes, whose garments and photographs no training scene has.  Two processes under torchrun.
Ctrl-C leaves complete checkpoints; run again, it goes on from there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file

from torch.distributed.elastic.multiprocessing.api import SignalException

from scripts import compose_scenes, two_starts
from scripts.two_starts import Phase
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_STOPPED
from swinv2_train.monitoring.console import duration_text

SIDE_PX = compose_scenes.KINDS["pixels"].side_px
MODEL = (
    "model=tiny", f"model.img_size={SIDE_PX}", "model.patch_size=2", "model.window_size=4",
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
    "task.head_channels=32", "task.aux_channels=16", f"task.resize_long_px={SIDE_PX}",
    f"task.resize_short_px={SIDE_PX}", "task.resize_scale=[0.9,1.25]", "task.photometric=false",
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
    options = two_starts.arguments_parser(__doc__, "runs/demo-segment", "data/scenes").parse_args(arguments)
    started = time.monotonic()
    phases = phases_of(options.runs, options.data, options.seeds, options.overrides)
    two_starts.check(phases)
    exit_code = compose_scenes.run(["--out", str(options.data)])
    if exit_code == EXIT_DONE:
        exit_code = two_starts.run_phases(phases, "demo-segment")
    if exit_code != EXIT_DONE:
        return exit_code
    found = two_starts.scores_by_way(phases, SCORES[0])
    print(f"\n{two_starts.table('trained on a tenth of the labels', found, SCORES)}")
    print(f"\nthis call took {duration_text(time.monotonic() - started)}\nreports: {options.runs}/*/report.html")
    return EXIT_DONE


def phases_of(runs: Path, data: Path, seeds: int, overrides: Sequence[str]) -> list[Phase]:
    """The trainings in order."""
    pretrain, shards = runs / "pretrain", f"data.shards={data}/train-*.tar"
    labelled = (f"data.shards={data}/{LABELLED}", f"data.eval_shards={data}/test-*.tar")
    first = two_starts.phase(pretrain, "SimMIM pre-training on all scenes", (*MODEL, *PRETRAIN, shards), overrides)
    return [first, *two_starts.both_ways(runs, pretrain, seeds, (*MODEL, *SEGMENT, *labelled), overrides)]


if __name__ == "__main__":
    try:
        sys.exit(guarded(main))
    except (KeyboardInterrupt, SignalException):  # outside of a training phase nothing needs saving
        sys.exit(EXIT_STOPPED)
