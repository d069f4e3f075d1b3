"""What a forward pass of a fresh model in evaluation mode does not show: stochastic depth and initial values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swinv2_train.models import SimMIM, swin_v2
from swinv2_train.models.swin_v2 import SwinBlock


def blocks_of(model: nn.Module) -> list[SwinBlock]:
    return [module for module in model.modules() if isinstance(module, SwinBlock)]


def small(**settings) -> nn.Module:
    return swin_v2("demo", img_size=32, window_size=4, pretrained_window_sizes=(0, 0), **settings)


def test_drop_path_rate_rises_linearly_over_the_blocks_of_all_stages():
    """From 0 at the first block to the given rate at the last, across the border of the stages (official code)."""
    rates = [block.drop_path_rate for block in blocks_of(small(depths=(2, 3), drop_path_rate=0.4))]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("branch", ["norm1", "norm2"])
def test_drop_path_drops_the_attention_and_the_mlp_alike(branch):
    """At a rate of almost 1 either branch is gone in training, and there in evaluation."""
    block = blocks_of(small(depths=(1, 1), drop_path_rate=0.999999))[-1]
    nn.init.ones_(getattr(block, branch).weight)
    x = torch.randn(2, 4, 4, 192)
    assert torch.equal(block.train()(x), x)
    assert not torch.allclose(block.eval()(x), x)


def test_fresh_weights_are_the_official_ones():
    """Every Linear: truncated normal of 0.02 and biases 0; res-post-norms 0, all other norms 1."""
    model = small(extra_norm_period=2)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            gain = 0.0 if name.endswith(("norm1", "norm2")) else 1.0
            assert (module.weight == gain).all() and not module.bias.any(), name
    assert any(name.endswith("norm3") for name, _ in model.named_modules())


def test_mask_token_starts_as_noise():
    """A token of zeros would be the same as an empty patch behind the patch norm (official: normal of 0.02)."""
    token = SimMIM(small(num_classes=0), 8).encoder.mask_token
    assert token is not None and token.std().item() == pytest.approx(0.02, rel=0.3)


def test_dropout_before_the_classes_drops_pooled_features_and_scales_the_rest_in_training_alone():
    model, images = small(drop_path_rate=0.0, head_dropout=0.75), torch.randn(64, 3, 16, 16)
    pooled = model.eval()(images, features=True)
    plain = model(images)
    assert torch.equal(plain, model.head(pooled))
    model.head = nn.Identity()
    dropped = model.train()(images)
    kept = dropped != 0
    assert 0.2 < kept.float().mean() < 0.3
    torch.testing.assert_close(dropped[kept], 4 * pooled[kept])
    with pytest.raises(ValueError, match=r"head_dropout \(1\) must be at least 0 and less than 1"):
        small(head_dropout=1)
