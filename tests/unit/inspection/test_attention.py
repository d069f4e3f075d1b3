"""What queries attend to, as it is recomputed for pictures: the module's own output must follow from it."""

from __future__ import annotations

import math

import pytest
import torch

from swinv2_train.inspection.attention import (
    BlockPlace,
    attention_of,
    block_at,
    last_pairs,
    on_map,
    query_weights,
    token_at,
    unravelled,
)
from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.windows import WindowGrid, window_grid
from tests.support.evaluation import make_model

ATOL = 2e-5  # measured worst 2.4e-6

GRIDS = {
    "in place": (window_grid((8, 8), (4, 4), False), (4, 4)),
    "shifted": (window_grid((8, 8), (4, 4), True), (4, 4)),
    "padded": (window_grid((7, 6), (4, 4), False), (4, 4)),
    "padded and shifted": (window_grid((7, 10), (4, 4), True), (4, 4)),
    "not square": (window_grid((6, 12), (3, 4), True), (3, 4)),
    "of a larger pre-trained window": (window_grid((6, 6), (3, 3), True), (8, 8)),
    "clamped on one side": (window_grid((4, 8), (6, 6), True), (6, 6)),
    "of a clip": (window_grid((4, 6, 6), (2, 4, 4), True), (2, 4, 4)),
}


def make_attention(pretrained: tuple[int, ...], qkv_bias: bool = True, fused: bool = False) -> WindowAttention:
    torch.manual_seed(2)
    attention = WindowAttention(12, 3, pretrained, qkv_bias, fused)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return attention


@pytest.mark.parametrize("name", GRIDS)
@torch.no_grad()
def test_the_modules_own_output_follows_from_the_weights(name):
    """Weights times values, projected, for every token of the map."""
    grid, pretrained = GRIDS[name]
    attention = make_attention(pretrained, qkv_bias=name != "padded")
    x = torch.randn(1, *grid.size, 12)
    expected = attention(x, grid).view(-1, 12)
    for query in range(math.prod(grid.size)):
        found = query_weights(attention, x, grid, query)
        answer = attention.proj((found.weights.unsqueeze(1) @ found.values).flatten())  # (h, 1, d) -> (C,)
        torch.testing.assert_close(answer, expected[query], atol=ATOL, rtol=0)


@torch.no_grad()
def test_weights_are_those_of_plain_loops_in_float64():
    """By the paper's formula, token by token, without a window, a mask or an index of ours."""
    grid, _ = GRIDS["padded and shifted"]
    attention = make_attention((4, 4)).double()
    x = torch.randn(1, *grid.size, 12, dtype=torch.float64)
    q, k, _ = (x[0] @ attention.qkv.weight.t() + attention_bias(attention)).view(7, 10, 3, 3, 4).unbind(2)
    row, column = 6, 7
    found = on_map(query_weights(attention.float(), x.float(), grid, row * 10 + column), BlockPlace(0, 0), grid, 67)
    attention.double()

    def group(at: int, length: int) -> tuple[int, bool]:
        """Which window of the shifted map a token is in, and whether the shift has brought it there."""
        padded = -(-length // 4) * 4
        return (at - 2) % padded // 4, at < 2

    for head in range(3):
        logits = {}
        for r in range(7):
            for c in range(10):
                if (group(r, 7), group(c, 10)) == (group(row, 7), group(column, 10)):
                    a, b = q[row, column, head], k[r, c, head]
                    cosine = float(a @ b / (a.norm() * b.norm()))
                    offset = torch.tensor([row - r, column - c], dtype=torch.float64) / 3 * 8
                    offset = offset.sign() * (offset.abs() + 1).log2() / 3
                    bias = attention.cpb_mlp(offset)[head]
                    scale = math.exp(min(float(attention.logit_scale[head]), math.log(100)))
                    logits[r, c] = cosine * scale + float(bias)
        total = sum(math.exp(value) for value in logits.values())
        assert {tuple(place) for place in found.reach.nonzero().tolist()} == logits.keys()
        for place, value in logits.items():
            assert float(found.weights[head][place]) == pytest.approx(math.exp(value) / total, abs=2e-6)
    assert found.query == (row, column)
    assert float(found.weights[:, ~found.reach].abs().max()) < 1e-30


def attention_bias(attention: WindowAttention) -> torch.Tensor:
    return torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))


@torch.no_grad()
def test_the_attention_of_a_whole_encoder_is_that_of_its_blocks():
    """And the hooks are gone afterwards; fused kernels, which keep no weights, give the same."""
    encoder = make_model()
    image = torch.randn(1, 3, 16, 16)
    places = last_pairs(encoder.depths)
    given: dict[BlockPlace, tuple[torch.Tensor, WindowGrid]] = {}
    handles = [
        block_at(encoder, place).attn.register_forward_pre_hook(lambda _, args, at=place: given.update({at: args}))
        for place in places
    ]
    encoder(image)
    for handle in handles:
        handle.remove()
    queries = [(0.5, 0.5), (0.0, 1.0)]
    found = attention_of(encoder, lambda: encoder(image), places, queries)
    assert places == [(0, 0), (1, 0)] and [len(block) for block in found] == [2, 2]
    for place, block in zip(places, found, strict=True):
        x, grid = given[place]
        for query, each in zip(queries, block, strict=True):
            token = token_at(query, grid.size)
            expected = on_map(query_weights(block_at(encoder, place).attn, x, grid, token), place, grid, token)
            assert torch.equal(each.weights, expected.weights) and torch.equal(each.reach, expected.reach)
            assert each.weights.sum(dim=(1, 2)).numpy() == pytest.approx(1, abs=1e-6)
            assert each.query == unravelled(token, grid.size)
    assert not any(module._forward_pre_hooks for module in encoder.modules())
    fused = SwinTransformerV2(
        img_size=16, num_classes=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2,
        pretrained_window_sizes=(0, 0), drop_path_rate=0.0, fused_attention=True,
    )  # fmt: skip
    fused.load_state_dict(encoder.state_dict())
    again = attention_of(fused.eval(), lambda: fused(image), places, queries)
    torch.testing.assert_close(again[1][0].weights, found[1][0].weights, atol=1e-5, rtol=0)


def test_the_last_two_blocks_of_each_stage():
    assert last_pairs((1, 2, 5)) == [(0, 0), (1, 0), (1, 1), (2, 3), (2, 4)]


@pytest.mark.parametrize(
    ("query", "size", "place"),
    [((0.5, 0.5), (4, 4), (2, 2)), ((1.0, 0.0), (3, 5), (2, 0)), ((0.99, 0.34), (7, 3), (6, 1)),
     ((0.5, 0.2, 0.9), (2, 5, 5), (1, 1, 4))],
)  # fmt: skip
def test_a_query_is_the_token_at_its_place(query, size, place):
    assert unravelled(token_at(query, size), size) == place
