"""Does a SwinV2 of clips see time?  Twelve camera motions over real footage; from images' SimMIM weights and from none.

    make demo-video                                   # or: python scripts/demo_video.py
    make demo-video DEMO_ARGS="--seeds 1 train.epochs=2"   # a key of one task goes to its runs alone

Clips are cut from real films, their labels true by construction (scripts/compose_clips.py).  One SimMIM pre-training
sees single frames of the training clips; then models of clips train twice each way (another seed: other weights, order
and views), from these weights, inflated, and from none, and are scored on clips of films that no training clip is of.
Beside them: a model that sees one frame of each clip, and the models of clips shown one frame eight times.  Two
processes under torchrun.  Ctrl-C leaves complete checkpoints; run again, it goes on from there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, when this is run as a file

from torch.distributed.elastic.multiprocessing.api import SignalException

from scripts import compose_clips, two_starts
from scripts.demo import evaluate
from scripts.two_starts import Phase
from swinv2_train.config.command_line import guarded
from swinv2_train.config.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from swinv2_train.monitoring.console import duration_text

MODEL = (
    "model=demo", "model.img_size=32", "model.embed_dim=32", "model.depths=[2,2]", "model.num_heads=[2,4]",
    "engine=zero1", "engine.precision=fp32", "data.num_workers=0", "train.checkpoint_every_steps=200",
    "optim.schedule.warmup_epochs=0.5", "optim.schedule.min_lr=1e-5", "optim.clip_grad_norm=5.0",
)  # fmt: skip
PRETRAIN = (
    "task=simmim", "task.mask_unit_px=8", "data=folder", "train.epochs=6", "train.global_batch_size=64",
    "train.micro_batch_size=32", "optim.lr=2e-3",
)  # fmt: skip
CLASSIFY = (
    "task=classify", f"task.num_classes={len(compose_clips.CLASSES)}", "task.rand_augment=null",
    "task.erasing_prob=0", "task.mixup_alpha=0", "task.cutmix_alpha=0", "data=labelled", "data.hflip=0",
    "data.interpolation=bilinear", "data.crop_scale=[0.64,1.0]", "data.crop_ratio=[1.0,1.0]", "data.eval_crop_pct=0.8",
    "data.frame_stride=1", "train.epochs=2", "train.global_batch_size=64", "train.micro_batch_size=32", "optim.lr=3e-3",
    "optim.layer_decay=1.0",
)  # fmt: skip
"""Without flips, which change what the camera does; chosen on held-out views of training films."""
CLIPS = ("model.frames=8", "model.patch_frames=2")
ONE_FRAME = ("model.frames=1", "model.patch_frames=1")
STILL = f"data.frame_stride={compose_clips.FRAMES}"
"""A clip that is shorter begins again: its first frame, eight times."""
SCORES = ("val/top1", "val/top5")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code of the first phase that does not end well, or 0."""
    options = two_starts.arguments_parser(__doc__, "runs/demo-video", "data/clips").parse_args(arguments)
    started = time.monotonic()
    phases = phases_of(options.runs, options.data, options.seeds, options.overrides)
    two_starts.check(phases)
    exit_code = compose_clips.run(["--out", str(options.data)])
    if exit_code == EXIT_DONE:
        exit_code = two_starts.run_phases(phases, "demo-video")
    if exit_code != EXIT_DONE:
        return exit_code
    found: dict[str, list[dict[str, float]]] = {**two_starts.scores_by_way(phases, SCORES[0])}
    found["one frame, from scratch"] = [two_starts.last_scores(phases[-1].run_dir, SCORES[0])]
    print("\nThe models of clips, shown the first frame alone, eight times", flush=True)
    for way in two_starts.WAYS:
        scores = evaluate(next(phase.run_dir for phase in phases if phase.way == way), [STILL])
        if scores is None:
            return EXIT_FAILED
        found[f"{way}, seed 0, shown one frame eight times"] = [scores]
    chance = 100 / len(compose_clips.CLASSES)
    print(f"\n{two_starts.table(f'camera motions (chance: {chance:.2f} %)', found, SCORES)}")
    print(f"\nthis call took {duration_text(time.monotonic() - started)}\nreports: {options.runs}/*/report.html")
    return EXIT_DONE


def phases_of(runs: Path, data: Path, seeds: int, overrides: Sequence[str]) -> list[Phase]:
    """The trainings in order."""
    pretrain = runs / "pretrain"
    frames = f"data.shards={data}/{compose_clips.FRAMES_OF_TRAIN}"
    labelled = (f"data.shards={data}/{compose_clips.TRAIN}", f"data.eval_shards={data}/{compose_clips.TEST}")
    own = (*MODEL, *CLASSIFY, *labelled)
    return [
        two_starts.phase(pretrain, "SimMIM pre-training on single frames", (*MODEL, *PRETRAIN, frames), overrides),
        *two_starts.both_ways(runs, pretrain, seeds, (*own, *CLIPS), overrides),
        two_starts.phase(runs / "one-frame", "one frame of each clip, from scratch", (*own, *ONE_FRAME), overrides),
    ]


if __name__ == "__main__":
    try:
        sys.exit(guarded(main))
    except (KeyboardInterrupt, SignalException):  # outside of a training phase nothing needs saving
        sys.exit(EXIT_STOPPED)
