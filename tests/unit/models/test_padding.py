"""Windows over maps they do not tile: what is clamped, shifted and padded, and that padding has no say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.cosine import attention_weights, join_heads, split_heads, unit_vectors, window_bias
from swinv2_train.models.windows import attention_mask, cut_windows, join_windows, window_grid
from tests.support.model_cases import random_model

CPU = torch.device("cpu")


class Outputs(TorchDispatchMode):
    """Remembers the results of every operation, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, list[torch.Tensor]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.of.setdefault(function.overloadpacket.__name__, []).append(result)
        return result


@pytest.mark.parametrize(
    ("size", "window_size", "shorter", "window", "shift", "padded"),
    [
        ((16, 16), (8, 8), False, (8, 8), (4, 4), (16, 16)),
        ((8, 16), (8, 8), False, (8, 8), (0, 4), (8, 16)),  # per axis: the long side is still shifted
        ((8, 16), (8, 8), True, (8, 8), (0, 0), (8, 16)),  # official: neither is
        ((6, 16), (8, 8), False, (6, 8), (0, 4), (6, 16)),
        ((6, 16), (8, 8), True, (6, 6), (0, 0), (6, 18)),
        ((12, 16), (8, 8), True, (8, 8), (4, 4), (16, 16)),
        ((7, 11), (3, 5), False, (3, 5), (1, 2), (9, 15)),
        ((5, 5), (1, 1), False, (1, 1), (0, 0), (5, 5)),
        ((1, 3), (2, 2), False, (1, 2), (0, 1), (1, 4)),
    ],
)
def test_windows_are_clamped_and_shifted_per_axis_or_by_the_shorter_side(
    size, window_size, shorter, window, shift, padded
):
    grid = window_grid(size, window_size, shifted=True, clamp_to_shorter_side=shorter)
    assert (grid.window, grid.shift, grid.padded) == (window, shift, padded)
    still = window_grid(size, window_size, shifted=False, clamp_to_shorter_side=shorter)
    assert (still.window, still.shift, still.padded) == (window, (0, 0), padded)


SIZES = list(itertools.product((1, 2, 3, 5, 7, 8), (4, 6, 9), (1, 2, 3, 4, 5), (2, 4), (False, True)))


@pytest.mark.parametrize("shifted", [False, True])
def test_every_query_has_a_key_and_padded_keys_have_none(shifted):
    """A row of -inf alone would be NaN after the softmax.  Windows, padding and edges of every kind."""
    for height, width, rows, cols, shorter in SIZES:
        if shorter and rows != cols:
            continue
        grid = window_grid((height, width), (rows, cols), shifted, shorter)
        mask = attention_mask(grid, CPU)
        real = cut_windows(torch.ones(1, height, width, 1), grid)[..., 0].bool()  # (nW, N)
        assert real.sum() == height * width
        assert (mask[~real[:, None].expand_as(mask)] == -math.inf).all()
        assert set(mask[real[:, None].expand_as(mask)].tolist()) <= {0.0, -100.0}
        assert real.any(-1).all(), grid
        assert (mask.diagonal(dim1=1, dim2=2)[real] == 0).all()  # a token of the map always sees itself


@pytest.mark.parametrize("shifted", [False, True])
def test_cutting_and_joining_windows_gives_the_map_back(shifted):
    for height, width, rows, cols, _ in SIZES:
        grid = window_grid((height, width), (rows, cols), shifted)
        x = torch.randn(2, height, width, 3)
        assert torch.equal(join_windows(cut_windows(x, grid), grid), x)


@pytest.mark.parametrize("shifted", [False, True])
def test_whatever_stands_in_the_padding_changes_nothing(shifted):
    """Bit for bit: padded keys have a weight of 0, not a small one."""
    grid = window_grid((7, 10), (4, 4), shifted)
    scale, bias = torch.full((2, 1, 1), 10.0), window_bias(torch.randn(49, 2), grid.window)
    windows = cut_windows(torch.randn(2, 7, 10, 24), grid)  # (B*nW, N, 3C)
    real = cut_windows(torch.ones(2, 7, 10, 1), grid)[..., 0].bool()  # (B*nW, N)
    assert not real.all()
    mask = attention_mask(grid, CPU).repeat(2, 1, 1).unsqueeze(1)

    def attended(windows, mask):
        q, k, v = split_heads(windows, 2)
        weights = attention_weights(unit_vectors(q), unit_vectors(k), scale, bias, mask)
        return weights, join_heads(weights @ v)[real]

    weights, expected = attended(windows, mask)
    other = torch.where(real.unsqueeze(-1), windows, 100 * torch.randn_like(windows))
    assert torch.equal(attended(other, mask)[1], expected)
    assert not torch.allclose(attended(other, None)[1], expected)  # without the mask it would
    padded_keys = ~real[:, None, None].expand_as(weights)
    assert not weights[padded_keys].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("shifted", [False, True])
def test_the_attention_of_a_map_gives_padding_no_weight(shifted):
    grid = window_grid((7, 10), (4, 4), shifted)
    with Outputs() as outputs:
        WindowAttention(8, 2, (4, 4))(torch.randn(2, 7, 10, 8), grid)
    (weights,) = outputs.of["_softmax"]  # (B, nW, h, N, N)
    real = cut_windows(torch.ones(2, 7, 10, 1), grid)[..., 0].bool().view(2, -1, 1, 1, 16)
    assert not weights[~real.expand_as(weights)].any()


def test_a_fresh_model_on_padded_maps_has_finite_gradients():
    """Padded queries are vectors of zeros then (q_bias starts as 0), and so are padded keys, always."""
    model = SwinTransformerV2(
        img_size=(26, 38), patch_size=2, num_classes=3, embed_dim=8, depths=(2, 2, 2), num_heads=(1, 2, 2),
        window_size=4, pretrained_window_sizes=(0, 0, 0),
    )  # fmt: skip
    for images in (torch.randn(2, 3, 26, 38), torch.zeros(2, 3, 26, 38)):
        model.zero_grad()
        model(images).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert model.layers[0].blocks[1].norm1.bias.grad.any()


def test_maps_that_windows_tile_are_not_padded_and_unshifted_windows_not_masked():
    """No extra work where the official code does none."""
    model = random_model(
        img_size=32, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=8,
        pretrained_window_sizes=(0, 0),
    )  # fmt: skip
    operations = {}
    for height in (32, 34):
        images = torch.randn(1, 3, height, 32, dtype=torch.float64)
        model.forward_features(images)  # makes the tables
        with Outputs() as operations[height]:
            model.forward_features(images)
    assert len(operations[32].of["roll"]) == 2  # one block of four is shifted, there and back; the second map is 8x8
    assert "constant_pad_nd" not in operations[32].of
    assert len(operations[34].of["constant_pad_nd"]) == 5  # all blocks, and the merging of 17x16


def test_only_a_shift_or_padding_needs_a_mask():
    assert not window_grid((16, 8), (8, 8), shifted=False).needs_mask
    assert not window_grid((8, 8), (8, 8), shifted=True).needs_mask
    assert window_grid((16, 8), (8, 8), shifted=True).needs_mask
    assert window_grid((9, 8), (8, 8), shifted=False).needs_mask
