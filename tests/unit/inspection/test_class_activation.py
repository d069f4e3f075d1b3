"""Grad-CAM: by its formula, and for models of which it is known where they look."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swinv2_train.inspection.class_activation import cam_layer, class_activation
from swinv2_train.models import SwinTransformerV2
from tests.support.evaluation import make_model


def image(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("number", range(4))
def test_of_the_last_map_it_is_the_head_s_row_times_the_map(number):
    """The head takes the map's mean, so the gradient is the class's row of the head over the number of places."""
    model = make_model()
    (found,) = class_activation(cam_layer(model, 1), lambda: [model(image())[0, number]])
    with torch.no_grad():
        last = model.forward_features(image())[-1].double()[0]  # (C, h, w)
    row = model.head.weight[number].detach().double()
    expected = np.zeros((2, 2))
    for r in range(2):
        for c in range(2):
            expected[r, c] = max(0.0, sum(float(row[k] * last[k, r, c]) for k in range(len(row))) / 4)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_of_an_earlier_map_it_is_that_of_finite_differences():
    """In float64, of the rest of the model as a function of the map alone."""
    model = make_model().double()
    x = image().double()
    (found,) = class_activation(cam_layer(model, 0), lambda: [model(x)[0, 2]])
    with torch.no_grad():
        first = model.layers[0].blocks[0](model.patch_embed(x))  # (1, 4, 4, 8)

        def score(activation: torch.Tensor) -> float:
            y = model.layers[0].downsample(activation)
            y = model.norm(model.layers[1].blocks[0](y))
            return float(model.head(y.mean(dim=(1, 2)))[0, 2])

        shares = []
        for channel in range(8):
            step = torch.zeros_like(first)
            step[..., channel] = 1e-5  # a step of all places at once: the sum of their derivatives
            shares.append((score(first + step) - score(first - step)) / 2e-5 / 16)
    expected = sum(share * first[0, :, :, channel] for channel, share in enumerate(shares)).clamp(min=0)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-6, rtol=1e-4)


@torch.no_grad()
def quarter_model(x: torch.Tensor) -> SwinTransformerV2:
    """A SwinV2 whose class 1 is read from the lower left quarter of x alone.

    Fresh blocks are the identity, so that a token knows its own pixels; the head's row is at a right angle to the
    tokens of the rest.
    """
    torch.manual_seed(1)
    model = SwinTransformerV2(
        img_size=16, num_classes=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2, drop_path_rate=0.0,
        pretrained_window_sizes=(0, 0),
    )  # fmt: skip
    last = model.eval().forward_features(x)[-1][0]  # (C, 2, 2)
    rest, quarter = last[:, 0, 0], last[:, 1, 0]
    model.head.weight[1] = quarter - rest * (rest @ quarter) / (rest @ rest)
    return model


def test_a_model_that_looks_at_one_quarter_is_seen_to():
    x = torch.zeros(1, 3, 16, 16)
    x[:, 0, 8:, :8] = 1.0
    model = quarter_model(x)
    (found,) = class_activation(cam_layer(model, 1), lambda: [model(x)[0, 1]])
    found = found / found.max()
    assert found[1, 0] == 1 and sorted(found.flatten().tolist())[2] < 1e-5


def test_nothing_is_kept_of_the_model_and_what_speaks_against_is_not_shown():
    model = make_model().requires_grad_(False)
    said = [
        class_activation(cam_layer(model, 1), lambda sign=sign: [sign * model(image()).sum()])[0] for sign in (1, -1)
    ]
    assert (said[0] * said[1]).abs().max() == 0 and said[0].max() + said[1].max() > 0
    assert not model.norm._forward_hooks and all(parameter.grad is None for parameter in model.parameters())
