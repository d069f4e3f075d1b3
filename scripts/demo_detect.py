"""Detection on real pixels: garments on photographs, from SimMIM weights and from none; trees in aerial photographs.

    make demo-detect                                    # or: python scripts/demo_detect.py
    make demo-detect DEMO_ARGS="--seeds 1 train.epochs=2"   # a key of one task goes to its runs alone

Scenes are composed of real photographs (scripts/compose_scenes.py) with exact boxes and masks.  One SimMIM pre-training
sees all training scenes without labels; then Mask R-CNN trains on some of them, twice each way (another seed: other
weights, order and views), and is scored on the test scenes, whose garments and photographs no training scene has.
Trees: a detector of garments goes on with tiles of one aerial photograph with hand-drawn boxes, and those of another
are scored (scripts/fetch_trees.py).  Two processes under torchrun.  Ctrl-C leaves complete checkpoints; run again, it
goes on from there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file

from torch.distributed.elastic.multiprocessing.api import SignalException

from scripts import compose_scenes, fetch_trees, two_starts
from scripts.two_starts import Phase
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_STOPPED
from swinv2_train.monitoring.console import duration_text

SIDE_PX, CLASSES = compose_scenes.KINDS["objects"].side_px, compose_scenes.CLASSES[1:]
CROP_PX = 160
"""Side of a training crop of trees, at about their own scale."""
MODEL = (
    "model=tiny", "model.patch_size=4", "model.window_size=4", "model.embed_dim=32", "model.depths=[2,2,2,2]",
    "model.num_heads=[1,2,4,8]", "model.drop_path_rate=0.0", "engine=zero1", "engine.precision=fp32",
    "data.num_workers=0", "train.checkpoint_every_steps=200",
)  # fmt: skip
PRETRAIN = (
    "task=simmim", f"model.img_size={SIDE_PX}", "task.mask_unit_px=16", "data=folder", "train.epochs=8",
    "train.global_batch_size=64", "train.micro_batch_size=32", "optim.lr=2e-3", "optim.schedule.warmup_epochs=1",
    "optim.schedule.warmup_lr=1e-6", "optim.schedule.min_lr=1e-5",
)  # fmt: skip
DETECT = (
    "task=detect", "task.head_channels=32", "task.head_width=128", "task.level_proposals=100", "task.proposals=100",
    "task.eval_proposals=100", "task.score_threshold=0.02", "data=labelled", "data.crop_scale=[1.0,1.0]",
    "optim.schedule.warmup_steps=50", "optim.clip_grad_norm=5.0",
)  # fmt: skip
GARMENTS = (
    f"model.img_size={SIDE_PX}", f"task.num_classes={len(CLASSES)}", f"task.class_names=[{','.join(CLASSES)}]",
    "task.max_objects=8", "task.box_samples=16", "task.mask_samples=4", "task.detections=20", "task.min_object_px=6",
    "task.resize_scale=[0.9,1.25]", f"task.eval_long_px={SIDE_PX}", f"task.eval_short_px={SIDE_PX}",
    "train.epochs=12", "train.global_batch_size=16", "train.micro_batch_size=8", "optim.lr=2e-3",
)  # fmt: skip
TREES = (
    f"model.img_size={CROP_PX}", "task.masks=false", "task.num_classes=1", f"task.class_names=[{fetch_trees.CLASS}]",
    "task.max_objects=64", "task.level_proposals=200", "task.proposals=200", "task.eval_proposals=200",
    "task.box_samples=64", "task.mask_samples=1", "task.min_object_px=10", "data.dihedral=true",
    f"task.resize_scale=[{0.8 * fetch_trees.TILE_PX / CROP_PX},{1.25 * fetch_trees.TILE_PX / CROP_PX}]",
    f"task.eval_long_px={fetch_trees.TILE_PX}", f"task.eval_short_px={fetch_trees.TILE_PX}",
    "train.epochs=24", "train.global_batch_size=8", "train.micro_batch_size=4", "optim.lr=1e-3", "seed=0",
)  # fmt: skip
LABELLED = "train-000000.tar"
"""A tenth of the training scenes."""
BOX_SCORES = ("val/box_ap", "val/box_ap50")
SCORES = (*BOX_SCORES, "val/mask_ap", "val/mask_ap50")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code of the first phase that does not end well, or 0."""
    options = two_starts.arguments_parser(__doc__, "runs/demo-detect", "data").parse_args(arguments)
    started = time.monotonic()
    scenes, trees = options.data / "scenes", options.data / "trees"
    phases = phases_of(options.runs, options.data, options.seeds, options.overrides)
    two_starts.check(phases)
    objects = ["--kind", "objects", "--out", str(scenes / "objects"), "--raw", str(scenes / "raw")]
    exit_code = compose_scenes.run(objects)
    if exit_code == EXIT_DONE:
        exit_code = fetch_trees.run(["--out", str(trees)])
    if exit_code == EXIT_DONE:
        exit_code = two_starts.run_phases(phases, "demo-detect")
    if exit_code != EXIT_DONE:
        return exit_code
    found = two_starts.scores_by_way(phases, SCORES[0])
    print(f"\n{two_starts.table('garments, trained on a tenth of the labels', found, SCORES)}")
    alone = {"from the garments' detector": [two_starts.last_scores(phases[-1].run_dir, SCORES[0])]}
    print(f"\n{two_starts.table('trees of another photograph', alone, BOX_SCORES)}")
    print(f"\nthis call took {duration_text(time.monotonic() - started)}\nreports: {options.runs}/*/report.html")
    return EXIT_DONE


def phases_of(runs: Path, data: Path, seeds: int, overrides: Sequence[str]) -> list[Phase]:
    """SimMIM on all scenes, the trainings on a tenth of their labels, and the one on trees, which takes the heads of
    the first detector of garments that fit.
    """
    pretrain, scenes, trees = runs / "pretrain", data / "scenes/objects", data / "trees"
    shards = f"data.shards={scenes}/train-*.tar"
    labelled = (f"data.shards={scenes}/{LABELLED}", f"data.eval_shards={scenes}/test-*.tar")
    tiles = (f"data.shards={trees}/train-*.tar", f"data.eval_shards={trees}/test-*.tar")
    first = two_starts.phase(pretrain, "SimMIM pre-training on all scenes", (*MODEL, *PRETRAIN, shards), overrides)
    ways = two_starts.both_ways(runs, pretrain, seeds, (*MODEL, *DETECT, *GARMENTS, *labelled), overrides)
    own = (*MODEL, *DETECT, *TREES, *tiles, f"task.init_from={ways[0].run_dir}")
    return [first, *ways, two_starts.phase(runs / "trees", "trees", own, overrides)]


if __name__ == "__main__":
    try:
        sys.exit(guarded(main))
    except (KeyboardInterrupt, SignalException):  # outside of a training phase nothing needs saving
        sys.exit(EXIT_STOPPED)
