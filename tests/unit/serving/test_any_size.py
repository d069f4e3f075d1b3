"""The form in which sizes are arithmetic lays the very windows that the model lays, on every size."""

from __future__ import annotations

import copy

import pytest
import torch

from swinv2_train.models import SwinTransformerV2
from swinv2_train.serving.any_size import size_step, takes_any_size

ATOL = 1e-5  # measured worst 1e-6


@pytest.mark.parametrize(
    ("window", "options"),
    [
        (7, {"pretrained_window_sizes": (0, 6)}),  # divides neither 16 x 24 nor 8 x 12
        ((4, 6), {"pretrained_window_sizes": (0, 0), "extra_norm_period": 2}),
        (8, {"pretrained_window_sizes": (12, 6), "clamp_to_shorter_side": True, "qkv_bias": False}),
    ],
)
def test_it_equals_the_model_on_every_size(window, options):
    """Maps smaller than the window, as large, larger, padded or not, in each direction; sizes of one step too."""
    torch.manual_seed(0)
    model = SwinTransformerV2(
        img_size=(64, 96), num_classes=3, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=window, **options
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    other = copy.deepcopy(model)
    takes_any_size(other)
    assert size_step(model) == 8
    for sides in ((8, 8), (8, 40), (32, 24), (64, 64), (64, 96), (120, 56)):
        images = torch.randn(2, 3, *sides)
        with torch.no_grad():
            torch.testing.assert_close(other(images), model(images), rtol=0, atol=ATOL, msg=str(sides))
