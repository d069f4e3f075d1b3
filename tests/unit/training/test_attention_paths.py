"""Which way every stage attends and why, on one rank; tests/distributed/test_kernel_failures.py has several."""

from __future__ import annotations

import pytest
import torch

from swinv2_train.distributed import World
from swinv2_train.engine.compile import compile_blocks
from swinv2_train.models.initial import on_meta
from swinv2_train.models.kernels import cpu_attention, failures, trial
from swinv2_train.models.kernels.failures import case_of
from swinv2_train.models.swin_v2 import SwinBlock
from swinv2_train.models.windows import window_grid
from swinv2_train.tasks.encoder import build_model
from swinv2_train.training.attention_paths import AttentionPaths
from tests.support.configs import composed
from tests.support.kernel_faults import break_library

WORLD = World(0, 0, 1, 1, torch.device("cpu"))
SIZES = (
    "run_dir=unused", "data.shards=unused", "model.name=tiny", "model.img_size=[48,32]", "model.patch_size=2",
    "model.window_size=4", "model.embed_dim=16", "model.depths=[2,2,1,1]", "model.num_heads=[2,2,4,4]",
    "model.pretrained_window_sizes=[0,0,0,0]", "task.mask_unit_px=16",
)  # fmt: skip
FUSED = {f"stage {number}": "C++ fused" for number in (1, 2, 3, 4)}
pytestmark = pytest.mark.skipif(cpu_attention.problem() is not None, reason="there is no compiled kernel here")


@pytest.fixture(autouse=True)
def afresh(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    trial.forget()
    yield
    trial.forget()


def paths(*overrides: str):
    """The paths, the model, and what is said and told of changes."""
    config = composed([*SIZES, *overrides])
    with on_meta():
        encoder = build_model(config.model, 0)
    said, changes = [], []
    return AttentionPaths(config, WORLD, encoder, said.append, changes.append), encoder, said, changes


def uses(encoder) -> list[bool]:
    """Of each stage's blocks, whether they use the kernels; all of a stage alike."""
    found = [{block.attn.fused for block in stage.blocks} for stage in encoder.layers]
    return [each == {True} for each in found if len(each) == 1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kernels_that_are_good_serve_every_stage_without_a_word(precision):
    chosen, encoder, said, changes = paths("model.attention=fused", f"engine.precision={precision}")
    assert chosen.record() == FUSED and uses(encoder) == [True] * 4 and said == changes == []
    assert not chosen.fell_back()


def test_the_reference_and_chunks_are_told_apart():
    chosen, encoder, said, _ = paths("model.attention=reference", "model.sequential_stages=[1]")
    why = "model.attention=reference"
    assert chosen.record() == {"stage 1": f"sequential: {why}"} | {f"stage {n}": f"reference: {why}" for n in (2, 3, 4)}
    assert said == [] and uses(encoder) == [False] * 4


def test_a_kernel_that_fails_at_one_window_is_left_out_there_alone_and_loudly(monkeypatch):
    """Maps are 24 x 16, 12 x 8, 6 x 4 and 3 x 2 tokens: the window is clamped in the last two stages."""
    break_library(monkeypatch, "backward", window=(3, 2))
    chosen, encoder, said, _ = paths("model.attention=fused")
    assert uses(encoder) == [True, True, True, False]
    why = "the kernels failed (windows of 3x2, head dim 32, bfloat16): RuntimeError: no such instruction"
    assert chosen.record() == FUSED | {"stage 4": f"reference: {why}"}
    (line,) = said
    assert line == (
        f"warning: model.attention (fused) is not used in stage 4: {why}; the reference path serves, which is several "
        "times slower"
    )


def test_without_any_kernel_one_line_says_so(monkeypatch):
    monkeypatch.setattr(cpu_attention, "_load", lambda: (None, "there is no C++ compiler"))
    chosen, encoder, said, _ = paths("model.attention=fused")
    assert uses(encoder) == [False] * 4
    assert set(chosen.record().values()) == {"reference: there is no C++ compiler"}
    assert len(said) == 1 and said[0].startswith(
        "warning: model.attention (fused) is not used: there is no C++ compiler;"
    )


def test_sizes_that_no_kernel_knows_are_named(monkeypatch):
    monkeypatch.setattr(cpu_attention, "MAX_TOKENS", 15)
    chosen, encoder, said, _ = paths("model.attention=fused")
    assert uses(encoder) == [False, False, False, True], "the last window has 6 tokens"
    assert chosen.record()["stage 3"] == "reference: windows of 16 tokens are more than 15"
    assert said[0].startswith("warning: model.attention (fused) is not used in stage 1, 2, 3: windows of 16 tokens")


@pytest.mark.parametrize(("size", "stages"), [((12, 8), [2]), ((18, 18), [1, 2, 3, 4])])
def test_what_fails_later_is_left_out_where_it_is_used_once(size, stages):
    """A case of no stage at this image size (an evaluation's) may be any stage's, so none goes on with the kernels."""
    chosen, encoder, said, changes = paths("model.attention=fused", "engine.precision=fp32")
    dim = 16 if len(stages) == 1 else 8
    with failures.surviving(lambda case, cause: None):
        case = case_of(torch.float32, window_grid(size, (4, 4), shifted=True), dim)
        failures.got_over(case, RuntimeError("gone"), torch.device("cpu"))
        assert chosen.fell_back() and not chosen.fell_back()
    assert uses(encoder) == [number not in stages for number in (1, 2, 3, 4)]
    assert len(said) == 1 and "RuntimeError: gone" in said[0] and said[0].endswith("; the step is taken again")
    assert changes == [chosen.record()]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_compiled_blocks_fall_back_too(which, monkeypatch):
    """Their graphs hold the kernel as one operation, and are made anew without it when a stage leaves it out."""
    config = composed([*SIZES, "model.attention=fused", "engine.precision=fp32", "model.drop_path_rate=0"])
    torch.manual_seed(0)
    encoder = build_model(config.model, 3)
    compile_blocks(encoder, (SwinBlock,), backend="eager")
    chosen = AttentionPaths(config, WORLD, encoder, lambda text: None, lambda paths: None)
    images = torch.randn(2, 3, 48, 32)

    def gradients() -> list[torch.Tensor]:
        encoder.zero_grad()
        encoder(images).square().sum().backward()
        return [parameter.grad for parameter in encoder.parameters()]

    good = gradients()
    break_library(monkeypatch, which, window=(4, 4))
    with failures.surviving(lambda *what: None):
        assert not all(torch.isfinite(gradient).all() for gradient in gradients()) or failures.pending()
        assert failures.pending() and chosen.fell_back()
        assert uses(encoder) == [False, False, False, True], "the third stage has 6 x 4 tokens"
        for ours, fused in zip(gradients(), good, strict=True):
            torch.testing.assert_close(ours, fused, rtol=1e-3, atol=1e-4)
        assert not failures.pending()
    torch.compiler.reset()
