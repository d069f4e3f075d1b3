"""The planner and the gate before clips: what is counted, and what is refused."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from swinv2_train import plan
from swinv2_train.config import ConfigError
from swinv2_train.models.initial import on_meta
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


def test_on_a_card_windows_of_clips_take_what_serves_there():
    """The Triton kernels do not know them, and the scores of all windows are kept; the C++ kernel does."""
    kept = {}
    for frames in ("null", "4"):
        for on_cpu in (False, True):
            config = composed([*CLASSIFY, f"model.frames={frames}", "model.window_size=8", "model.window_frames=4"])
            kept[frames, on_cpu] = trace_step(config, 0.0, on_cpu=on_cpu).forward.kept["stage 1"]
    tokens = 4 * 8 * 8  # one window of stage 1, 2 blocks, 3 heads
    assert kept["4", False] - kept["4", True] > 2 * 3 * tokens**2 * 4
    assert kept["null", False] - kept["null", True] < 2 * 3 * 64**2 * 4


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
    plan.plan(composed([*recipe, "engine=zero1"]), [])
    assert "fits on 64 x A100 SXM 40 GB: peak 34.3" in capsys.readouterr().out
