"""Sequential attention: the batched one's numbers, in memory that does not grow with the number of windows."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.cosine import window_attention
from swinv2_train.models.sequential import Chunks, sequential_window_attention
from swinv2_train.models.windows import WindowGrid, window_grid
from tests.support.live_bytes import LiveBytes
from tests.support.model_cases import QUICK_AND_SLOW, gradients_of, relative_error, settings_of

FLOAT64_BOUND = 1e-10  # of the largest entry; measured worst 2e-14
MAPS = ((8, 8), (7, 10), (5, 13), (12, 6), (3, 20))
WINDOWS = ((4, 4), (3, 5), (8, 2), (1, 1))
CLIPS = ((4, 8, 8), (3, 7, 5), (6, 4, 3))
CLIP_WINDOWS = ((2, 4, 4), (4, 3, 3), (1, 4, 4))


def inputs_of(grid: WindowGrid, batch: int, heads: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """A projected map in dtype, scales of 1 to 100 and a bias table as the real ones are; leaves."""
    wide = torch.promote_types(dtype, torch.float32)
    offsets = math.prod(2 * length - 1 for length in grid.window)
    qkv = torch.randn(batch, *grid.size, 3 * heads * dim, dtype=torch.float64)
    scale = torch.logspace(0, 2, heads, dtype=torch.float64).view(heads, 1, 1)
    table = 16 * torch.rand(offsets, heads, dtype=torch.float64)
    return [t.to(d).requires_grad_() for t, d in ((qkv, dtype), (scale, wide), (table, wide))]


def attended(attend, inputs) -> list[torch.Tensor]:
    """Output and gradients of a random weighting of it, the same for every caller."""
    out = attend(*inputs)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, probe)]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 3, 5, 10**6])
def test_output_and_all_gradients_equal_the_batched_path(chunk, shifted):
    """Shifted or not, padded or not, windows of all shapes, chunks that do not divide and that span two images."""
    kinds = [*itertools.product(MAPS, WINDOWS, (1, 2)), *itertools.product(CLIPS, CLIP_WINDOWS, (1, 2))]
    for size, window, batch in kinds:
        grid = window_grid(size, window, shifted)
        inputs = inputs_of(grid, batch, 2, 3, torch.float64)
        expected = attended(lambda *a, grid=grid: window_attention(*a, grid, 2), inputs)
        got = attended(lambda *a, grid=grid: sequential_window_attention(*a, grid, 2, chunk), inputs)
        for name, e, g in zip(("output", "qkv", "scale", "table"), expected, got, strict=True):
            assert g.dtype == e.dtype and g.shape == e.shape
            assert relative_error(g, e) < FLOAT64_BOUND, (size, window, batch, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 4])
def test_rounding_errors_are_those_of_the_batched_path(dtype, chunk):
    """Both against float64 from the same rounded inputs, and against each other."""
    grid = window_grid((13, 18), (8, 8), True)
    inputs = inputs_of(grid, 2, 4, 16, dtype)
    exact = attended(lambda *a: window_attention(*a, grid, 4), [t.detach().double().requires_grad_() for t in inputs])
    batched = attended(lambda *a: window_attention(*a, grid, 4), inputs)
    got = attended(lambda *a: sequential_window_attention(*a, grid, 4, chunk), inputs)
    for name, e, b, g in zip(("output", "qkv", "scale", "table"), exact, batched, got, strict=True):
        assert g.dtype == b.dtype
        error = ((g.double() - e).norm() / e.norm()).item()
        reference = ((b.double() - e).norm() / e.norm()).item()
        assert error < 2 * reference, name  # measured worst 1.6, of scale in float32


def test_gradients_are_those_of_finite_differences():
    grid = window_grid((3, 4), (2, 3), True)
    inputs = inputs_of(grid, 1, 2, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: sequential_window_attention(*a, grid, 2, 1), inputs)


@pytest.mark.parametrize("case", QUICK_AND_SLOW)
def test_a_model_with_sequential_stages_equals_one_without(case):
    """Every case of maps and windows, drop path included; maps, the images' gradient and all parameters'."""
    settings = {**settings_of(case), "num_classes": 0, "drop_path_rate": 0.4}
    stages = range(1, len(settings["depths"]) + 1)
    torch.manual_seed(0)
    batched = SwinTransformerV2(**settings).double()
    sequential = SwinTransformerV2(**settings, sequential_stages=stages, attention_chunk_windows=3).double()
    with torch.no_grad():
        for name, parameter in batched.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.5 * torch.randn_like(parameter))
    sequential.load_state_dict(batched.state_dict())
    images = torch.randn(2, 3, *batched.img_size, dtype=torch.float64).requires_grad_()

    def run(model):
        torch.manual_seed(5)  # drop path
        maps = model.forward_features(images)
        return maps, gradients_of(maps, {"images": images, **dict(model.named_parameters())})

    (expected, expected_gradients), (got, gradients) = run(batched), run(sequential)
    assert all(block.attn.chunks == Chunks(3, 256.0) for stage in sequential.layers for block in stage.blocks)
    for e, g in zip(expected, got, strict=True):
        assert relative_error(g, e) < FLOAT64_BOUND
    for name, e in expected_gradients.items():
        floor = 1e-3 if "logit_scale" in name or "cpb" in name else 0.0  # clamped scales and saturated biases
        assert relative_error(gradients[name], e, floor) < FLOAT64_BOUND, name


@pytest.mark.parametrize("inside", [False, True])
def test_under_autocast_it_is_the_batched_path_under_autocast(inside):
    """With the backward pass outside of autocast, as it should be, and inside, as some write it."""
    x = torch.randn(2, 9, 12, 32)
    torch.manual_seed(0)
    batched = WindowAttention(32, 2, (4, 4))
    sequential = WindowAttention(32, 2, (4, 4), chunks=Chunks(4, 1.0))
    sequential.load_state_dict(batched.state_dict())
    grid, results = window_grid((9, 12), (4, 4), True), []
    for attention in (batched, sequential):
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(x, grid)
            if inside:
                out.float().square().sum().backward()
        if not inside:
            out.float().square().sum().backward()
        results.append((out, {name: p.grad for name, p in attention.named_parameters()}))
    (expected, expected_gradients), (got, gradients) = results
    assert got.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(got, expected)
    for name, e in expected_gradients.items():
        error = ((gradients[name] - e).norm() / e.norm()).item()
        assert error < 0.02, name  # measured worst 0.006: cosines, or their gradients, are the ones that are rounded


def test_a_float32_map_is_multiplied_in_float32_also_under_autocast():
    """Forward and backward alike, wherever the backward pass is called."""
    grid = window_grid((7, 10), (4, 4), True)
    inputs = inputs_of(grid, 1, 2, 4, torch.float32)
    expected = attended(lambda *a: sequential_window_attention(*a, grid, 2, 3), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = attended(lambda *a: sequential_window_attention(*a, grid, 2, 3), inputs)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_a_checkpoint_it_gives_the_same_bits(use_reentrant):
    attention = WindowAttention(16, 2, (4, 4), chunks=Chunks(2, 1.0))
    grid = window_grid((7, 10), (4, 4), True)
    x = torch.randn(2, 7, 10, 16, requires_grad=True)

    def gradients(forward):
        out = forward(x)
        return torch.autograd.grad(out.square().sum(), [x]) if not use_reentrant else backward(out)

    def backward(out):  # a reentrant checkpoint knows .backward() alone
        x.grad = None
        attention.zero_grad()
        out.square().sum().backward()
        return [x.grad.clone(), *(p.grad.clone() for p in attention.parameters())]

    plain = gradients(lambda x: attention(x, grid))
    again = gradients(lambda x: checkpoint(attention, x, grid, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_second_derivative_is_refused():
    grid = window_grid((4, 4), (2, 2), False)
    inputs = inputs_of(grid, 1, 1, 2, torch.float64)
    out = sequential_window_attention(*inputs, grid, 1, 1)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_without_gradients_it_serves_too(context):
    grid = window_grid((7, 10), (4, 4), True)
    inputs = [t.detach() for t in inputs_of(grid, 2, 2, 4, torch.float32)]
    with context():
        got = sequential_window_attention(*inputs, grid, 2, 3)
    torch.testing.assert_close(got, window_attention(*inputs, grid, 2))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["meta", "fake"])
def test_a_model_without_bytes_can_be_traced(where):
    """The planner does it, on padded and shifted maps."""
    settings = {"img_size": 26, "patch_size": 2, "num_classes": 3, "embed_dim": 8, "depths": (2, 2),
                "num_heads": (1, 2), "window_size": 4, "pretrained_window_sizes": (0, 0)}  # fmt: skip
    device = torch.device("meta" if where == "meta" else "cpu")
    with device:
        model = SwinTransformerV2(**settings, sequential_stages=[1, 2], attention_chunk_windows=2)
    with nullcontext() if where == "meta" else FakeTensorMode(allow_non_fake_inputs=True):
        out = model(torch.randn(2, 3, 26, 38, device=device))
        gradients = torch.autograd.grad(out.sum(), list(model.parameters()))
    assert out.shape == (2, 3)
    assert [g.shape for g in gradients] == [p.shape for p in model.parameters()]


def peak_of(
    windows: int, chunk: int | None, dtype: torch.dtype = torch.float32, device: str = "meta", side: int = 8
) -> int:
    """Most live bytes of one attention, forward and backward, in `windows` windows of side x side, shifted, 4 heads."""
    grid = window_grid((2 * side, windows // 2 * side), (side, side), True)
    inputs = [t.detach().to(device).requires_grad_() for t in inputs_of(grid, 1, 4, 4, dtype)]
    with LiveBytes() as live:
        if chunk is None:
            out = window_attention(*inputs, grid, 4)
        else:
            out = sequential_window_attention(*inputs, grid, 4, chunk)
        out.sum().backward()
    return live.peak


SQUARE = 4 * 64 * 64 * 4  # bytes of one window's h x N x N in float32


@pytest.mark.slow
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_memory_grows_with_the_chunk_and_not_with_the_number_of_windows(device):
    """Per window more, batched attention keeps some N x N; sequential attention keeps rows of the map alone."""
    batched = (peak_of(32, None, device=device) - peak_of(8, None, device=device)) / 24
    assert batched > 3 * SQUARE
    for chunk in (1, 8):
        more = (peak_of(32, chunk, device=device) - peak_of(8, chunk, device=device)) / 24
        assert more < 0.3 * SQUARE  # measured 0.26: qkv, the output and their gradients; batched 4.8
    by_chunk = [peak_of(32, chunk, device=device) for chunk in (1, 4, 16, 32)]
    assert by_chunk == sorted(by_chunk) and by_chunk[-1] > 4 * by_chunk[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_chunk_takes_the_bytes_that_its_budget_counts(dtype):
    """The slope of the measured peak over the chunk size; a chunk's own rows (N x d) come on top."""
    grid = window_grid((64, 1024), (32, 32), True)
    counted = 2**40 / Chunks(None, 2.0**20).windows_at_a_time(grid, 4, dtype)
    measured = (peak_of(64, 48, dtype, side=32) - peak_of(64, 16, dtype, side=32)) / 32
    assert counted < measured < 1.03 * counted  # measured 1.014 to 1.017


def test_the_number_of_windows_follows_from_the_budget():
    giant = window_grid((384, 384), (32, 32), True)
    assert Chunks(5, 1.0).windows_at_a_time(giant, 16, torch.bfloat16) == 5
    assert Chunks(None, 1.0).windows_at_a_time(giant, 16, torch.bfloat16) == 1  # one always fits
    assert Chunks(None, 256.0).windows_at_a_time(giant, 16, torch.bfloat16) == 1  # 164 MiB each
    assert Chunks(None, 256.0).windows_at_a_time(window_grid((64, 64), (8, 8), False), 3, torch.float32) == 2730


def test_stages_and_chunks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"sequential_stages \(0, 5\) must be among the stages 1 to 4"):
        SwinTransformerV2(sequential_stages=[0, 5])
    with pytest.raises(ValueError, match=r"attention_chunk_windows \(0\) must be 1 or more"):
        SwinTransformerV2(sequential_stages=[1], attention_chunk_windows=0)
    model = SwinTransformerV2(embed_dim=32, num_heads=(1, 2, 4, 8), sequential_stages=[2], attention_chunk_mib=1)
    chunks = [{block.attn.chunks for block in stage.blocks} for stage in model.layers]
    assert chunks == [{None}, {Chunks(None, 1)}, {None}, {None}]
