"""scripts/official_arithmetic.py: the peer of our benchmarks computes what our model computes."""

from __future__ import annotations

import pytest
import torch

from scripts.official_arithmetic import OfficialArithmetic
from swinv2_train.models import SwinTransformerV2


def small_model(**changes):
    torch.manual_seed(0)
    settings = {"img_size": 64, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
    settings |= {"num_classes": 10, "pretrained_window_sizes": (0, 0), "drop_path_rate": 0.0} | changes
    model = SwinTransformerV2(**settings)
    for parameter in model.parameters():  # res-post-norm blocks start as the identity: nothing would be compared
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("changes", [{}, {"window_size": 8}, {"window_size": 16}, {"extra_norm_period": 2}])
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_outputs_and_gradients_are_those_of_our_model(changes, use_checkpoint):
    """float64, worst seen 2e-15 of the largest entry."""
    model = small_model(**changes).double()
    official = OfficialArithmetic(model, use_checkpoint)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for forward in (model, official):
        model.zero_grad()
        logits = forward(images)
        logits.square().sum().backward()
        results.append([logits.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * ours.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("changes", [{"img_size": (64, 128)}, {"window_size": 5}])
def test_sizes_that_the_official_code_refuses(changes):
    with pytest.raises(ValueError, match="square maps that windows tile"):
        OfficialArithmetic(small_model(**changes))
