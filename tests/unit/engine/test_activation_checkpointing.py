"""What model.recompute and the keys of sequential attention say, and what is refused before anything starts."""

from __future__ import annotations

import copy

import pytest
import torch

from swinv2_train.config import RECOMPUTE_PLACES, ConfigError, Recompute, parse_recompute
from swinv2_train.engine.activation_checkpointing import apply_recompute, recompute_warning
from swinv2_train.engine.deepspeed.config import check_engine
from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.tasks.encoder import build_model
from tests.support.configs import composed
from tests.support.live_bytes import LiveBytes

MEANINGS = {
    "none": Recompute(None, None, None, "stay"),
    "blocks": Recompute("blocks", None, None, "stay"),
    "attention": Recompute("attention", None, None, "stay"),
    "stages:1-2": Recompute("blocks", (1, 2), None, "stay"),
    "stages:3": Recompute("blocks", (3, 3), None, "stay"),
    "every:4": Recompute("blocks", None, 4, "stay"),
}


def compose(*overrides: str):
    return composed(["model=tiny", "data=cifar10", "task=simmim", "task.mask_unit_px=4", "run_dir=runs/x",
                              *overrides])  # fmt: skip


@pytest.mark.parametrize("what", MEANINGS)
def test_every_spelling_means_what_it_says(what):
    assert parse_recompute(what, 4) == MEANINGS[what]
    if what != "none":
        for place in RECOMPUTE_PLACES:
            assert parse_recompute(f"{what}@{place}", 4) == MEANINGS[what]._replace(place=place)


@pytest.mark.parametrize("what", ["blocks@cpu", "stages:1-2@cpu", "stages:2@fairscale", "every:3@partitioned"])
def test_a_policy_needs_no_quotes_on_the_command_line(what):
    assert compose(f"model.recompute={what}").model.recompute == what


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("offload", r"model\.recompute \(offload\) is now spelled blocks@fairscale"),
        ("block", r"model\.recompute \(block\) is none of none, blocks, attention, stages:I-J"),
        ("stages:", r"model\.recompute \(stages:\) is none of"),
        ("stages:1-", r"model\.recompute \(stages:1-\) is none of"),
        ("stages:0-2", r"model\.recompute \(stages:0-2\): the model has the stages 1 to 4"),
        ("stages:2-5", r"the model has the stages 1 to 4"),
        ("stages:3-2", r"the model has the stages 1 to 4"),
        ("every:1", r"model\.recompute \(every:1\) would keep every block; set 2 or more"),
        ("every:-2", r"model\.recompute \(every:-2\) is none of"),
        ("blocks@disk", r"model\.recompute \(blocks@disk\): .* go to one of @stay, @cpu, @fairscale, @partitioned"),
        ("blocks@", r"go to one of @stay"),
        ("none@cpu", r"policy other than none"),
    ],
)
def test_other_spellings_are_refused_with_the_remedy(policy, message):
    with pytest.raises(ConfigError, match=message):
        compose(f"model.recompute={policy}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.sequential_stages=[1,5]", r"model\.sequential_stages \(5\) must be at least 1 and at most 4"),
        ("model.sequential_stages=[0]", r"model\.sequential_stages \(0\)"),
        ("model.attention_chunk_windows=0", r"model\.attention_chunk_windows \(0\) must be at least 1"),
        ("model.attention_chunk_mib=0", r"model\.attention_chunk_mib \(0\.0\) must be more than 0"),
    ],
)
def test_stages_and_chunks_out_of_range_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        compose(override)


def test_the_keys_of_sequential_attention_reach_the_blocks():
    config = compose("model.sequential_stages=[1,3]", "model.attention_chunk_windows=7", "model.attention_chunk_mib=9")
    chunks = [{block.attn.chunks for block in stage.blocks} for stage in build_model(config.model, 0).layers]
    assert chunks == [{(7, 9.0)}, {None}, {(7, 9.0)}, {None}]


def test_saved_inputs_leave_the_device_by_cpu_alone():
    """Counted on the meta device, as the planner does: what stands for the accelerator holds less after the forward
    pass, by the input of every block but the first, which the image's patches hold too."""
    with torch.device("meta"):
        model = SwinTransformerV2(
            img_size=32, patch_size=2, num_classes=0, embed_dim=8, depths=(3,), num_heads=(1,), window_size=4,
            pretrained_window_sizes=(0,), sequential_stages=[1], attention_chunk_windows=32,
        )  # fmt: skip

    def kept(policy):
        copy_ = copy.deepcopy(model)
        apply_recompute(copy_, policy, (SwinBlock,))
        with LiveBytes() as live:
            out = copy_(torch.randn(2, 3, 32, 32, device="meta"))
            kept = live.now()
            out.sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in copy_.parameters() if p.requires_grad)
        return kept

    one_input = 2 * 16 * 16 * 8 * 4
    none, blocks, cpu, every, attention = map(kept, ("none", "blocks", "blocks@cpu", "every:2", "attention"))
    assert none - blocks > 10 * one_input
    assert blocks - cpu >= 2 * one_input
    assert blocks < every < none
    assert blocks < attention < none


def test_partitioned_inputs_need_deepspeed_and_say_that_they_free_nothing():
    with pytest.raises(ConfigError, match=r"blocks@partitioned\) needs engine\.name=deepspeed, not local"):
        compose("model.recompute=blocks@partitioned", "engine=local")
    assert "frees nothing here" in recompute_warning("blocks@partitioned")
    assert recompute_warning("blocks@cpu") is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # DeepSpeed's engine reads none of it, so it would be a policy that silently is not there.
        ("activation_checkpointing.partition_activations=true", r"activation_checkpointing: .*set model\.recompute"),
        ("activation_checkpointing.cpu_checkpointing=true", r"activation_checkpointing: .*set model\.recompute"),
        # Adds a bias in place to what selective recomputation has kept: wrong gradients (tests/distributed/test_traps).
        ("zero_optimization.memory_efficient_linear=true", r"memory_efficient_linear \(True\) contradicts"),
        # fairscale's and DeepSpeed's checkpoints compute again in another dtype than autocast did.
        ("torch_autocast.enabled=true", r"torch_autocast: set engine\.precision"),
    ],
)
@pytest.mark.parametrize("policy", ["blocks", "attention@fairscale"])
def test_what_would_give_wrong_gradients_or_none_of_the_memory_is_refused(override, message, policy):
    config = compose(f"model.recompute={policy}", "engine=zero3", f"+engine.deepspeed_overrides.{override}")
    with pytest.raises(ConfigError, match=message):
        check_engine(config.engine)
