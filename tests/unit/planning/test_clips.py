"""The planner and the gate before clips: what is counted, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swinv2_train import plan
from swinv2_train.config import ConfigError
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.initial import on_meta
from swinv2_train.models.windows import window_grid
from swinv2_train.planning.trace import meta_task, trace_step
from tests.support.configs import composed

CLIP = (
    "run_dir=x", "data.shards=x",
    "model=demo", "model.img_size=32", "model.window_size=4", "model.frames=4", "model.window_frames=2",
    "task.mixup_alpha=0", "task.cutmix_alpha=0", "task.erasing_prob=0", "engine=local", "train.micro_batch_size=1",
)  # fmt: skip
CLASSIFY = ("task=classify", "task.num_classes=10", "task.rand_augment=null", *CLIP)


def test_a_clip_is_counted_with_all_its_frames():
    """Twice the frames: twice the batch and the products; the weights are the same."""
    four, eight = (trace_step(composed([*CLASSIFY, f"model.frames={n}"]), 0.0, on_cpu=True) for n in (4, 8))
    assert four.num_parameters == eight.num_parameters
    assert 1.9 < eight.model_flops_per_image / four.model_flops_per_image < 2.01
    assert 1.6 < eight.backward.total / four.backward.total < 2.2
    pixels = 3 * 32 * 32
    assert eight.batch_bytes - four.batch_bytes == 4 * pixels


def test_multiply_adds_are_those_that_torch_counts():
    task = meta_task(composed([*CLASSIFY, "model.attention=reference"]))
    with on_meta(), FlopCounterMode(display=False) as counter:
        task.module(task.meta_batch(1)["images"].float())
    assert 0.9 < 2 * task.multiply_adds / counter.get_total_flops() < 1.1  # norms on our side, bias MLPs on theirs


def test_windows_of_clips_are_counted_as_the_kernels_serve_them():
    """On a card and on a CPU: where the reference serves, the scores of all windows are kept; of 2,048 tokens only a
    card's kernels know windows."""
    window = ("model.window_size=8", "model.window_frames=4")
    kept = {
        (attention, on_cpu): trace_step(
            composed([*CLASSIFY, *window, f"model.attention={attention}"]), 0.0, on_cpu
        ).forward.kept["stage 1"]
        for attention in ("fused", "reference")
        for on_cpu in (False, True)
    }
    scores = 2 * 3 * (4 * 8 * 8) ** 2 * 4  # of one window of stage 1, 2 blocks, 3 heads
    assert all(kept["reference", on_cpu] - kept["fused", on_cpu] > scores for on_cpu in (False, True))
    qkv = torch.empty(1, 8, 16, 16, 3 * 32, device="meta")
    attention = WindowAttention(32, 1, (8, 16, 16), fused=True)
    grid = window_grid((8, 16, 16), (8, 16, 16), shifted=False)
    assert attention._fused_serves(qkv, grid)
    attention.meta_stands_for = "cpu"
    assert not attention._fused_serves(qkv, grid)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.patch_frames=3",), r"a clip's frames 4 is not a multiple of patch_frames 3; nearest: 3, 6"),
        (("task.cutmix_alpha=1", "train.micro_batch_size=2"), r"task.cutmix_alpha \(1.0\) takes boxes .*_alpha=0"),
        (("model.in_chans=1", "data.mean=[0]", "data.std=[1]"), r"model.frames \(4\): clips are of 3 x 8 bits"),
        (("task.rand_augment=rand-m9-mstd0.5-inc1",), r"task.rand_augment \(rand-.*each image.*task.rand_augment=null"),
        (("task.color_jitter=0.4",), r"task.color_jitter \(0.4\) is drawn for each image.*set task.color_jitter=0"),
        (("task.eval_scales=[1.0,1.5]",), r"task.eval_scales .* is of images, and model.frames \(4\) asks for clips"),
        (("model.window_frames=0",), r"model.window_frames \(0\) must be at least 1"),
    ],
)
def test_what_does_not_fit_clips_is_one_message(overrides, message):
    with pytest.raises(ConfigError, match=message):
        meta_task(composed([*CLASSIFY, *overrides]))


@pytest.mark.slow
def test_the_papers_giant_on_clips_fits_cards_of_40_gb_as_the_documents_say(capsys):
    """320x320x8, window 20x20x8, ZeRO-1, recomputation, sequential attention in two stages; a clip on each of 64."""
    recipe = ("experiment=k400_giant_320", "hardware=a100_40gb", "plan.num_gpus=64", "run_dir=x", "data.shards=x")
    for attention, peak in (("fused", "25.6"), ("reference", "34.3")):
        plan.plan(composed([*recipe, "engine=zero1", f"model.attention={attention}"]), [])
        assert f"fits on 64 x A100 SXM 40 GB: peak {peak}" in capsys.readouterr().out
