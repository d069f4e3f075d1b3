"""The fused window attention against an independent float64 one: on CUDA where there is a card, in Triton's interpreter
(TRITON_INTERPRET=1, set by conftest.py where there is none) elsewhere; skipped where the package triton is missing."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from swinv2_train.models import SwinTransformerV2, attention
from swinv2_train.models.cosine import window_attention
from swinv2_train.models.kernels import dispatch, failures, trial
from swinv2_train.models.kernels.failures import case_of
from swinv2_train.models.windows import WindowGrid, window_grid

tl = pytest.importorskip("triton.language", reason="the package triton is not installed")
from tests.support.interpreter import quicken  # noqa: E402  needs triton

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a CUDA device nor TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in")  # numpy's, on rows of padding, which nobody stores
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest entry, and for d scale of the sum of its summands' sizes: what rounds are they, and d scale is what is
# left when they have cancelled, of which the eager path in float32 too is off by up to 2.1e-4.  Measured worst of 55
# random cases 4.7e-7 (d scale; 2.9e-7 by the eager path), 1.7e-6 for everything else; at a scale of 100 7.2e-6 (6.6e-6)
# and 3.0e-6 (7.5e-6): a score of 144 is exact to 8e-6, and 2^x makes that relative.
RTOL = 2e-5
# At a scale of 100 a card's 2^x, exact to 2^-22, is off by more: up to 7.1e-5 with the bounds that PTX documents.
LARGEST_SCALE_RTOL = 1e-4 if DEVICE == "cuda" else RTOL


@pytest.fixture(autouse=True)
def triton_serves(monkeypatch, request):
    """Also on the CPU's tensors, which the kernel in C++ would take.

    The interpreter looks for overflows of whole numbers in the quick cases, of which every kernel and both ways of
    taking the bias have one.
    """
    monkeypatch.setattr(dispatch, "_compiled", lambda qkv: False)
    if DEVICE == "cpu":
        quicken(monkeypatch, overflows=request.node.get_closest_marker("slow") is None)


def reference(qkv, scale, table, grid, heads):
    """Every token against every token of the map, of an image or a clip; what keeps windows apart is arithmetic on
    coordinates.

    Nothing is padded, rolled or cut.  Unit vectors, scores and softmax in at least float32, products in qkv's dtype.
    """
    batch, *size, channels = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.view(batch, math.prod(size), 3, heads, -1).permute(2, 0, 3, 1, 4)  # (B, h, tokens, d)
    q, k = ((x.to(wide) / x.to(wide).norm(dim=-1, keepdim=True).clamp_min(1e-12)).to(x.dtype) for x in (q, k))
    cell = torch.cartesian_prod(*map(torch.arange, size)).view(-1, len(size)).to(qkv.device)
    window, shift = (torch.tensor(x, device=qkv.device) for x in (grid.window, grid.shift))
    whole = -(-torch.tensor(grid.size, device=qkv.device) // window) * window
    place = (cell - shift) % whole
    together = (place[:, None] // window == place[None] // window).all(-1)
    other_end = (cell[:, None] < shift) != (cell[None] < shift)
    apart = other_end[..., -2:].any(-1)
    together = together & ~other_end[..., :-2].any(-1)  # the two ends of a clip do not attend to each other at all
    offset = (place[:, None] % window - place[None] % window + window - 1).clamp(min=0)
    row = offset[..., 0]
    for axis in range(1, len(size)):
        row = row * (2 * grid.window[axis] - 1) + offset[..., axis]
    bias = table.to(wide)[row].permute(2, 0, 1)
    logits = (q @ k.transpose(-2, -1)).to(wide) * scale.to(wide) + bias - 100.0 * apart
    attention = logits.masked_fill(~together, -torch.inf).softmax(-1).to(v.dtype)
    return (attention @ v).transpose(1, 2).reshape(batch, *size, channels // 3)


def inputs(grid, heads, dim, batch=1, dtype=torch.float32, largest_scale=30.0, seed=0):
    """qkv, scale, table and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    offsets = math.prod(2 * length - 1 for length in grid.window)
    qkv = torch.randn(batch, *grid.size, 3 * heads * dim, generator=generator)
    scale = 1 + (largest_scale - 1) * torch.rand(heads, 1, 1, generator=generator)
    table = 16 * torch.rand(offsets, heads, generator=generator)
    grad = torch.randn(batch, *grid.size, heads * dim, generator=generator)
    return [x.to(DEVICE) for x in (qkv.to(dtype), scale, table, grad.to(dtype))]


def run(attention, qkv, scale, table, grad, grid, heads):
    """The output and the gradients of qkv, scale and table."""
    leaves = [x.detach().clone().requires_grad_() for x in (qkv, scale, table)]
    out = attention(*leaves, grid, heads)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def in_float64(tensors):
    return [x.double() for x in tensors]


def number(error):
    """An error as a float; infinite where it is not a number, which max() would pass over."""
    return math.inf if error.isnan() else error.item()


def relative_errors(found, expected):
    return [number((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]


def expected_of(tensors, grid, heads):
    """What run() gives in float64; and (h, 1, 1), the sum of the sizes of the summands of d scale, one for every pair
    of tokens."""
    qkv, scale, table, grad = in_float64(tensors)
    tokens = math.prod(grid.size)
    of_pairs = scale.expand(len(qkv), heads, tokens, tokens)
    out, d_qkv, summands, d_table = run(reference, qkv, of_pairs, table, grad, grid, heads)
    whole, sizes = (x.sum((0, 2, 3)).view_as(scale) for x in (summands, summands.abs()))
    return [out, d_qkv, whole, d_table], sizes


def assert_equals_float64(grid, heads, dim, rtol=RTOL, **kwargs):
    """Returns what was found, as run() does."""
    tensors = inputs(grid, heads, dim, **kwargs)
    expected, sizes = expected_of(tensors, grid, heads)
    found = run(dispatch.fused_window_attention, *tensors, grid, heads)
    errors = relative_errors(found, expected)
    errors[2] = number(((found[2] - expected[2]).abs() / sizes).max())
    assert max(errors) < rtol, (grid, heads, dim, errors)
    return found


def random_case(seed):
    """A small map: windows of 2 to 9 tokens per axis, up to two and a half of them, shifted two times of three."""
    rng = random.Random(seed)
    window = (rng.randint(2, 9), rng.randint(2, 7))
    size = tuple(rng.randint(w, int(w * rng.choice([1, 2, 2.5]))) for w in window)
    grid = window_grid(size, window, shifted=rng.random() < 0.67)
    tokens = grid.padded[0] * grid.padded[1]
    return grid, rng.randint(1, 2), rng.choice([16, 24, 32, 40]), rng.randint(1, 3) if tokens < 100 else 1


@pytest.mark.parametrize(
    "seed", [*range(1, 4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, *range(4, 12)))]
)
def test_output_and_gradients_equal_float64(seed):
    """Non-square windows, shifts and padding in either axis, head dims that are no powers of two, several images."""
    grid, heads, dim, batch = random_case(seed)
    assert_equals_float64(grid, heads, dim, batch=batch, seed=seed)


CLIPS = [
    ((4, 4, 5), (2, 3, 4), True, 1, 16),  # a window with both ends of the clip; every axis shifted, the sides padded
    pytest.param((3, 4, 6), (2, 3, 5), True, 1, 16, marks=pytest.mark.slow),  # time is padded too
    pytest.param((7, 3, 4), (4, 3, 4), True, 1, 16, marks=pytest.mark.slow),  # padding between the ends
    pytest.param((5, 3, 4), (4, 3, 4), True, 1, 24, marks=pytest.mark.slow),  # time alone is shifted
    pytest.param((4, 5, 3), (1, 3, 2), True, 2, 16, marks=pytest.mark.slow),  # windows of one frame: so many images
    pytest.param((4, 6, 5), (4, 4, 4), True, 1, 16, marks=pytest.mark.slow),  # time stays in place, the sides do not
    pytest.param((3, 4, 6), (2, 3, 3), False, 1, 40, marks=pytest.mark.slow),
    pytest.param((7, 5, 9), (3, 5, 7), True, 1, 32, marks=pytest.mark.slow),  # several tiles
    # whole tiles alone: the paper's window on a card, and in the interpreter 4 x 4 tiles in place of its 16 x 16
    pytest.param(*2 * ((8, 8, 8) if DEVICE == "cuda" else (4, 4, 8),), False, 1, 16, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "window", "shifted", "heads", "dim"), CLIPS)
def test_windows_of_clips_equal_float64(size, window, shifted, heads, dim):
    assert_equals_float64(window_grid(size, window, shifted), heads, dim, batch=2 if math.prod(size) < 100 else 1)


@pytest.mark.parametrize(
    ("size", "window", "shifted", "heads", "dim"),
    [
        ((3, 3, 4), (2, 3, 3), True, 1, 16),
        pytest.param((3, 7, 5), (2, 5, 4), True, 1, 16, marks=pytest.mark.slow),
        pytest.param((4, 5, 6), (1, 3, 3), True, 1, 16, marks=pytest.mark.slow),
        pytest.param((3, 5, 11), (2, 5, 10), True, 1, 16, marks=pytest.mark.slow),  # groups of 3 rows, and of 2
        pytest.param((2, 2, 33), (2, 2, 33), True, 1, 16, marks=pytest.mark.slow),  # a tile a row
    ],
)
def test_windows_of_clips_too_large_for_a_dense_bias_equal_float64(size, window, shifted, heads, dim, monkeypatch):
    """As 8x16x16, whose kernels take the bias from the table: here on small ones."""
    monkeypatch.setattr(dispatch, "DENSE_TOKENS", 0)
    grid = window_grid(size, window, shifted)
    first = assert_equals_float64(grid, heads, dim)
    second = run(dispatch.fused_window_attention, *inputs(grid, heads, dim), grid, heads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_windows_of_one_frame_are_those_of_images():
    """The same kernels, and the same bits; so of an image's window only one form is ever compiled."""
    clip, image = window_grid((2, 3, 2), (1, 2, 2), True), window_grid((3, 2), (2, 2), True)
    qkv, scale, table, grad = inputs(clip, 1, 16, batch=2)
    found = run(dispatch.fused_window_attention, qkv, scale, table, grad, clip, 1)
    qkv, grad = qkv.flatten(0, 1), grad.flatten(0, 1)
    expected = run(dispatch.fused_window_attention, qkv, scale, table, grad, image, 1)
    assert all(torch.equal(a.view_as(b), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "window", "shifted", "heads", "dim"),
    [
        ((11, 9), (8, 8), True, 1, 16),  # the last windows begin with rows of padding alone
        ((5, 6), (4, 4), True, 1, 128),
        ((3, 40), (2, 20), True, 1, 16),  # one row of the window fills a tile of the table's gradient
        ((40, 3), (20, 2), True, 2, 16),
        ((1, 7), (1, 4), True, 1, 16),
        ((2, 64), (2, 64), False, 1, 16),  # and here it is wider than the blocks of queries
        ((13, 12), (12, 12), True, 1, 32),
        ((5, 64), (5, 64), False, 1, 16),
        ((20, 16), (16, 16), True, 1, 32),
        *([((24, 24), (24, 24), False, 1, 16)] if DEVICE == "cuda" else []),  # next test: 18 x 18 tiles to interpret
    ],
)
def test_the_corners_of_the_sizes_equal_float64(size, window, shifted, heads, dim):
    assert_equals_float64(window_grid(size, window, shifted), heads, dim)


def test_the_largest_window_of_a_dense_bias_has_one(monkeypatch):
    """24 x 24, and 25 x 24 has none; then, as 24 x 24 on a card, a window of DENSE_TOKENS that is all whole tiles."""
    for rows in (24, 25):
        launch = dispatch._Launch(torch.empty(1, rows, 24, 48), window_grid((rows, 24), (rows, 24), False), 1)
        assert launch.dense == (rows == 24) == (launch.stride == 576)
    monkeypatch.setattr(dispatch, "DENSE_TOKENS", 64)
    assert_equals_float64(window_grid((8, 8), (8, 8), False), 1, 16)


def test_the_largest_scale_and_its_leaking_mask_equal_float64():
    """At a scale of 100 a masked score can beat one that is not masked; nothing overflows."""
    grid = window_grid((8, 8), (5, 4), True)
    assert_equals_float64(grid, 2, 16, rtol=LARGEST_SCALE_RTOL, largest_scale=100.0, seed=1)


@pytest.mark.slow
def test_a_gradient_of_the_scale_that_nearly_cancels_is_as_exact_as_its_summands():
    """A 100th of them is left here, in which the eager path in float32 is off by 2e-4."""
    grid, heads, dim, batch = random_case(24)
    assert_equals_float64(grid, heads, dim, rtol=LARGEST_SCALE_RTOL, largest_scale=100.0, batch=batch, seed=24)


@pytest.mark.parametrize("cosine", [-1, 1])
def test_without_a_running_maximum_the_largest_reach_neither_overflows_nor_vanishes(cosine, monkeypatch):
    """All cosines -1 or 1 at the largest scale whose scores go into the exponential as they are, two window corners
    apart in their bias by 16."""
    grid, heads, dim = window_grid((4, 4), (4, 4), False), 1, 16
    qkv, scale, table, grad = inputs(grid, heads, dim)
    qkv[..., :dim] = torch.linspace(-1, 2, dim)
    qkv[..., dim : 2 * dim] = 3 * cosine * qkv[..., :dim]
    table[0], table[-1] = 0.0, 16.0
    scale.fill_(dispatch.MAX_REACH / math.log2(math.e) - 8.01)
    expected = run(reference, *in_float64((qkv, scale, table, grad)), grid, heads)
    found = run(dispatch.fused_window_attention, qkv, scale, table, grad, grid, heads)
    monkeypatch.setattr(dispatch, "MAX_REACH", 0.0)
    online = run(dispatch.fused_window_attention, qkv, scale, table, grad, grid, heads)
    assert not torch.equal(found[0], online[0])  # two ways of computing it
    for outputs in (found, online):
        errors = relative_errors([outputs[0], outputs[3]], [expected[0], expected[3]])
        assert max(errors) < LARGEST_SCALE_RTOL, errors


@pytest.mark.parametrize(
    ("size", "window", "shifted", "heads", "dim"),
    [((7, 10), (5, 6), True, 1, 16), pytest.param((13, 12), (12, 12), True, 2, 24, marks=pytest.mark.slow)],
)
def test_windows_too_large_for_a_dense_bias_equal_float64(size, window, shifted, heads, dim, monkeypatch):
    """As of more than 24 x 24 tokens, whose kernels take the bias from the table: here on small ones."""
    monkeypatch.setattr(dispatch, "DENSE_TOKENS", 0)
    assert_equals_float64(window_grid(size, window, shifted), heads, dim)


def test_padding_that_scores_far_above_every_token_has_no_part_in_the_gradients():
    """All cosines -1 at a scale of 100: padding, whose cosine is 0, would have a weight beyond float32."""
    grid, heads, dim = window_grid((11, 9), (8, 8), True), 1, 16
    qkv, scale, table, grad = inputs(grid, heads, dim)
    qkv[..., :dim] = torch.linspace(-1, 2, dim)
    qkv[..., dim : 2 * dim] = -3 * qkv[..., :dim]
    scale.fill_(100.0)
    expected = run(reference, *in_float64((qkv, scale, table, grad)), grid, heads)
    found = run(dispatch.fused_window_attention, qkv, scale, table, grad, grid, heads)
    errors = relative_errors(
        [found[0], found[3], found[1][..., 2 * dim :]], [expected[0], expected[3], expected[1][..., 2 * dim :]]
    )
    assert max(errors) < RTOL, errors
    assert max(found[1][..., : 2 * dim].abs().max(), found[2].abs().max()) < 1e-3  # exact: 0 but for rounding


def test_vectors_of_length_zero_and_near_it_equal_float64():
    """Below the length 1e-12 a vector is divided by that, and its length has no gradient."""
    grid, heads, dim = window_grid((4, 4), (4, 4), False), 1, 16
    qkv, scale, table, grad = inputs(grid, heads, dim)
    qkv[0, 0, 0, :dim] = 0  # a query
    qkv[0, 1, 2, dim : 2 * dim] = 0  # a key
    qkv[0, 2, 1, dim : 2 * dim] *= 1e-14
    expected = run(reference, *in_float64((qkv, scale, table, grad)), grid, heads)
    found = run(dispatch.fused_window_attention, qkv, scale, table, grad, grid, heads)
    assert max(relative_errors(found, expected)) < RTOL
    ordinary = expected[1].abs() < 1e6
    torch.testing.assert_close(found[1].double()[ordinary], expected[1][ordinary], rtol=1e-4, atol=1e-4)
    assert 20 < (~ordinary).sum() <= 3 * dim


@pytest.mark.parametrize("window", [(4, 4), (9, 8)])  # one kernel for the backward pass, and three
def test_vectors_whose_square_is_beyond_float32_equal_normalize(window):
    """torch's normalize divides them by infinity: their unit vectors are 0, and so are their gradients."""
    grid, heads, dim = window_grid((window[0] + 1, window[1]), window, False), 1, 16
    qkv, scale, table, grad = inputs(grid, heads, dim)
    qkv[0, 0, 0, :dim] *= 1e19  # a query of a length of some 4e19
    qkv[0, 1, 2, dim : 2 * dim] *= 1e25  # a key
    qkv[0, 2, 1, : 2 * dim] *= 1e17  # a query and a key whose squares can be told
    expected = run(window_attention, qkv, scale, table, grad, grid, heads)  # float64 would know their lengths
    found = run(dispatch.fused_window_attention, qkv, scale, table, grad, grid, heads)
    assert all(x.isfinite().all() for x in found)
    assert max(relative_errors(found, [x.double() for x in expected])) < RTOL
    assert not found[1][0, 0, 0, :dim].any() and not found[1][0, 1, 2, dim : 2 * dim].any()
    qkv[0, 0, 0, 3] = torch.inf
    for each in (window_attention, dispatch.fused_window_attention):
        assert each(qkv, scale, table, grid, heads)[0, 0, 0].isnan().all()


@pytest.fixture
def exact_bfloat16(monkeypatch):
    """Triton 3.7's interpreter truncates to bfloat16 instead of rounding, and multiplies blocks of it by their bits."""
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def decoded(block):
        if block.dtype.scalar != tl.bfloat16:
            return block
        return TensorHandle((block.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounding_cast(builder, block, dtype):
        if (block.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(builder, block, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(block.data)).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, decoded(a), decoded(b), *rest)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("exact_bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("size", "window", "dim", "capability"),
    [
        ((8, 12), (8, 8), 32, 9),  # one tile per window: one kernel does the whole backward pass
        ((10, 8), (7, 6), 24, 9),
        ((13, 8), (12, 8), 32, 9),  # several: three kernels
        ((8, 7), (7, 7), 64, 9),  # wide heads have other tiles, on older cards yet others
        ((9, 8), (9, 8), 64, 8),
        ((10, 8), (9, 8), 128, 8),
        ((9, 8), (9, 8), 128, 9),
    ],
)
def test_half_precision_is_as_exact_as_the_reference_path(dtype, size, window, dim, capability, monkeypatch):
    """Root mean squares; the scale's gradient is one number, off by a fraction of one rounding of its summands."""
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    grid = window_grid(size, window, shifted=True)
    tensors = inputs(grid, 1, dim, dtype=dtype, largest_scale=10.0)
    expected, summands = expected_of(tensors, grid, 1)
    ours = run(dispatch.fused_window_attention, *tensors, grid, 1)
    theirs = run(reference, *tensors, grid, 1)
    for i, (own, other, exact) in enumerate(zip(ours, theirs, expected, strict=True)):
        size = summands if i == 2 else exact.norm()
        error, peer = ((x.double() - exact).norm() / size for x in (own, other))
        assert own.dtype == other.dtype
        limit = 0.15 * torch.finfo(dtype).eps if i == 2 else 1.3 * peer  # measured worst 0.06 eps; 1.18 (the output)
        assert error < limit, (i, error, peer)


@pytest.mark.slow
def test_gradients_are_the_same_bits_in_every_run_and_no_split_of_windows_is_lost():
    """Many windows and one head: their sum for the bias table is split over programs."""
    grid = window_grid((12, 11), (2, 2), shifted=True)
    tensors = inputs(grid, 1, 16)
    first = run(dispatch.fused_window_attention, *tensors, grid, 1)
    assert all(
        torch.equal(a, b) for a, b in zip(first, run(dispatch.fused_window_attention, *tensors, grid, 1), strict=True)
    )
    assert dispatch._Launch(tensors[0], grid, 1).table_programs()[2] == 36
    assert max(relative_errors(first, run(reference, *in_float64(tensors), grid, 1))) < RTOL


def test_splits_of_several_windows_equal_float64(monkeypatch):
    """As on a large batch, where a program adds up more windows than one; 9 windows do not divide by 4 splits."""
    monkeypatch.setattr(dispatch, "TABLE_PROGRAMS", 4)
    assert_equals_float64(window_grid((6, 6), (2, 2), True), 1, 16)


def test_views_as_inputs_equal_copies():
    """The projection and the gradient may be views; sum() gives an expanded gradient."""
    grid = window_grid((6, 5), (4, 4), shifted=True)
    qkv, scale, table, _ = inputs(grid, 1, 16, batch=2)
    view = torch.cat((qkv, qkv), -1)[..., : qkv.shape[-1]].requires_grad_()
    leaf = qkv.clone().requires_grad_()
    dispatch.fused_window_attention(view, scale, table, grid, 1).sum().backward()
    out = dispatch.fused_window_attention(leaf, scale, table, grid, 1)
    out.backward(torch.ones_like(out))
    assert torch.equal(view.grad, leaf.grad)


@pytest.mark.slow
@pytest.mark.parametrize("window", [(3, 4), (9, 4)])
def test_operators_keep_the_rules_of_torch_library(window):
    """opcheck: schema, fake results, autograd registration and tracing."""
    grid = window_grid((window[0], 5), window, shifted=True)
    qkv, scale, table, grad = inputs(grid, 1, 16)
    sizes = [list(x) for x in grid]
    leaves = [x.requires_grad_() for x in (qkv, scale, table)]
    torch.library.opcheck(dispatch._forward, (*leaves, *sizes, 1), rtol=1e-4, atol=1e-4)
    out, lse = dispatch._forward(*(x.detach() for x in leaves), *sizes, 1)
    arguments = (grad, *(x.detach() for x in leaves), out, lse, *sizes, 1)
    torch.library.opcheck(dispatch._backward, arguments, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_without_a_graph_break_gives_the_same_gradients():
    grid = window_grid((6, 5), (4, 4), shifted=True)
    tensors = inputs(grid, 1, 16)

    def attention(qkv, scale, table, grid, heads):
        return torch.compile(dispatch.fused_window_attention, backend="aot_eager", fullgraph=True)(
            qkv * 1.5, scale, table, grid, heads
        )

    def eager(qkv, scale, table, grid, heads):
        return dispatch.fused_window_attention(qkv * 1.5, scale, table, grid, heads)

    found, expected = run(attention, *tensors, grid, 1), run(eager, *tensors, grid, 1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_activation_checkpointing_gives_the_same_bits():
    grid = window_grid((6, 5), (4, 4), shifted=True)
    tensors = inputs(grid, 1, 16)

    def recomputed(*args):
        return checkpoint(dispatch.fused_window_attention, *args, use_reentrant=False)

    found, expected = run(recomputed, *tensors, grid, 1), run(dispatch.fused_window_attention, *tensors, grid, 1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_meta_device_tells_what_is_kept_for_the_backward_pass(dtype):
    """The planner counts saved tensors on meta: arguments, result and softmax denominators, nothing of size N x N."""
    grid, heads, dim, batch = window_grid((7, 6), (4, 4), shifted=True), 2, 16, 2

    def saved(device):
        kept: dict[tuple[int, ...], int] = {}
        leaves = [x.to(device).requires_grad_() for x in inputs(grid, heads, dim, batch, dtype)[:3]]

        def pack(tensor):
            kept[(*tensor.shape, tensor.element_size())] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = dispatch.fused_window_attention(*leaves, grid, heads)
        assert out.shape == (batch, *grid.size, heads * dim) and out.dtype == dtype
        return kept

    kept = saved(DEVICE)
    assert saved("meta") == kept
    extra = batch * 4 * heads * 16 * 4  # (B*nW, h, N) float32
    qkv_bytes = batch * 42 * 3 * heads * dim * dtype.itemsize
    assert sum(kept.values()) == qkv_bytes + qkv_bytes // 3 + extra + 4 * heads + 49 * heads * 4


def test_the_reference_path_serves_where_the_kernels_do_not():
    grid = WindowGrid((8, 8), (8, 8), (0, 0))
    assert not dispatch.fused_available(torch.zeros(1, 8, 8, 96, device="meta"), grid, 1)
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] >= dispatch.MIN_CAPABILITY:
        qkv = torch.zeros(1, 8, 8, 96, device="cuda")
        assert dispatch.fused_available(qkv, grid, 1) and dispatch.fused_available(qkv.half(), grid, 2)
        assert not dispatch.fused_available(qkv.double(), grid, 1)
        assert not dispatch.fused_available(qkv, grid, 4)  # d = 8
        assert not dispatch.fused_available(qkv, grid._replace(window=(65, 8)), 1)
        assert dispatch.fused_available(
            torch.zeros(1, 2, 4, 4, 96, device="cuda"), window_grid((2, 4, 4), (2, 4, 4), 0), 2
        )


def test_windows_whose_bias_table_is_too_long_are_left_to_the_next_path():
    """Those of the paper's clips are not."""
    card = torch.device("cuda")
    for window in ((8, 8, 8), (8, 16, 16), (8, 20, 20), (8, 24, 24), (8, 32, 32)):
        assert dispatch.unknown(card, torch.bfloat16, window_grid(window, window, False), 8, 32) is None
    said = dispatch.unknown(card, torch.bfloat16, window_grid((9, 32, 32), (9, 32, 32), False), 8, 32)
    assert said == "windows of 9x32x32 have 67473 offsets, more than 65536"
    said = dispatch.unknown(card, torch.bfloat16, window_grid((65, 8, 8), (65, 8, 8), False), 8, 32)
    assert said == "windows of 65x8x8 are larger than 64"


def test_a_table_of_another_window_is_an_error():
    grid = window_grid((8, 8), (4, 4), False)
    qkv, scale, table, _ = inputs(grid, 1, 16)
    with pytest.raises(AssertionError):
        dispatch.fused_window_attention(qkv, scale, table[:-1], grid, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--windows", "8", "24", "--padded"],
        ["--windows", "12", "--dtype", "float32"],
        ["--windows", "8", "--head-dim", "64"],
        ["--windows", "12", "--head-dim", "128"],
    ],
)
def test_every_kernel_compiles_for_cards_that_are_not_here(arguments):
    """The interpreter accepts what the compiler refuses, such as a variable that changes its shape in a loop."""
    script = Path(__file__).parents[2] / "scripts" / "compile_fused.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, *arguments], check=False, capture_output=True, text=True, timeout=500, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert {row[0] for row in rows} == {"8.0", "9.0"} and len(rows) >= 10
    assert max(int(row[4]) for row in rows) <= 64, done.stdout  # bytes spilled per thread; measured worst 48


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (3, 16, 24)])
def test_a_model_attends_by_the_kernels_where_they_are_available(size, monkeypatch):
    """Shifted and padded windows, of images and of clips, heads of 16; output within 1e-5 and gradients, those of the
    bias MLP too, within 1e-4 of their largest entries (measured 1e-6 and 1e-5)."""
    torch.manual_seed(0)
    frames = {"frames": size[0], "window_frames": 2} if len(size) == 3 else {}
    settings = {
        **frames,
        "img_size": size[-2:],
        "embed_dim": 32,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 5,
    }
    settings |= {"num_classes": 3, "pretrained_window_sizes": (0, 0), "drop_path_rate": 0.0}
    reference_model, model = (SwinTransformerV2(**settings, fused_attention=use).to(DEVICE) for use in (False, True))
    for parameter in reference_model.parameters():  # blocks start as the identity
        torch.nn.init.normal_(parameter, std=0.2)
    model.load_state_dict(reference_model.state_dict())
    calls = []
    monkeypatch.setattr(attention, "fused_available", lambda *arguments: True)
    monkeypatch.setattr(
        attention,
        "fused_window_attention",
        lambda *arguments: calls.append(1) or dispatch.fused_window_attention(*arguments),
    )
    images = torch.randn(1 if len(size) == 3 else 2, 3, *size, device=DEVICE)
    outputs = [each(images) for each in (reference_model, model)]
    assert len(calls) == 4
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[0].abs().max()
    for output in outputs:
        output.square().sum().backward()
    for (name, ours), expected in zip(model.named_parameters(), reference_model.parameters(), strict=True):
        assert (ours.grad - expected.grad).abs().max() <= 1e-4 * expected.grad.abs().max(), name


@pytest.mark.usefixtures("exact_bfloat16")
@pytest.mark.parametrize(("size", "window"), [((10, 12), 8), ((6, 5), 4)])
def test_kernels_that_fail_or_are_wrong_are_found_before_they_serve(size, window, monkeypatch, tmp_path):
    """In the trial of a run's cases: here with Triton's kernels as they are, then with broken ones."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device = torch.device(DEVICE)
    case = case_of(torch.bfloat16, window_grid(size, (window, window), shifted=True), 32)
    state = torch.random.get_rng_state()
    right, results = dispatch.fused_window_attention, []

    def fail(*arguments):
        raise RuntimeError("no such instruction")

    for kernels in (right, lambda *arguments: right(*arguments) * 1.2, fail):
        trial.forget()
        for path in tmp_path.rglob("kernels_good_*"):
            path.unlink()
        results.append(trial.problems_of([case], device, kernels))
    trial.forget()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert results[0] == {} and "from the reference" in results[1][case]
    assert results[2][case] == "RuntimeError: no such instruction"


@pytest.mark.parametrize("which", ["forward_kernel", "query_gradient_kernel", "table_reduction_kernel"])
def test_a_kernel_that_fails_while_it_serves_leaves_no_gradient_to_step_with(which, monkeypatch):
    """Its launch is what raises, as a compiler or a driver would; the reference gives the forward pass."""

    class Broken:
        def __getitem__(self, programs):
            raise RuntimeError("no such instruction")

    modules = [
        SimpleNamespace(**{name: f for name, f in vars(module).items() if name.endswith("_kernel")})
        for module in dispatch._kernels()
    ]
    for module in modules:
        if hasattr(module, which):
            setattr(module, which, Broken())
    grid = window_grid((7, 6), (7, 6), shifted=False)  # two tiles: each kernel has its launch
    qkv, scale, table, grad = inputs(grid, 1, 16)
    leaves = [each.to(DEVICE).requires_grad_() for each in (qkv, scale, table)]
    good = dispatch.fused_window_attention(*leaves, grid, 1)
    monkeypatch.setattr(dispatch, "_kernels", lambda: modules)
    with failures.surviving(lambda *what: None):
        out = dispatch.fused_window_attention(*leaves, grid, 1)
        assert (out - good).abs().max() <= 1e-4 * good.abs().max()
        gradients = torch.autograd.grad(out, leaves, grad.to(DEVICE))
        assert list(failures.pending()) == [case_of(torch.float32, grid, 16)]
    assert all(gradient.isnan().any() for gradient in gradients)
