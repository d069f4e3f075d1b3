"""model.compile=blocks: the numbers of the plain model, at sizes of map that come later too, without graph breaks."""

from __future__ import annotations

import copy

import pytest
import torch

from swinv2_train.engine.compile import compile_blocks
from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.swin_v2 import SwinBlock


def models(backend, **changes):
    """A plain model and a compiled one of the same weights."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    settings = {"img_size": 32, "embed_dim": 16, "depths": (3,), "num_heads": (1,), "window_size": 4, "num_classes": 3}
    settings |= {"pretrained_window_sizes": (0,), "drop_path_rate": 0.5, "fused_attention": True} | changes
    plain = SwinTransformerV2(**settings)
    for parameter in plain.parameters():  # blocks start as the identity
        torch.nn.init.normal_(parameter, std=0.2)
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, (SwinBlock,), backend)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    return plain, compiled


def run(model, images):
    """The output and all gradients of a training step, with the same random numbers each time."""
    torch.manual_seed(1)
    model.zero_grad()
    out = model(images)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def same(plain, compiled, *sizes):
    """Both give the same at all sizes, to 1e-5 of the largest entry (measured 4e-6, inductor sums in another order)."""
    for size in sizes:
        images = torch.randn(4, 3, *size)
        for expected, found in zip(run(plain, images), run(compiled, images), strict=True):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_sizes_that_come_later_and_stochastic_depth():
    plain, compiled = models("aot_eager")
    same(plain, compiled, (32, 32), (48, 32), (40, 40))
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 3 * 3  # the first block, whose rate is 0, a shifted one and one that is neither, at three sizes
    same(plain, compiled, (32, 32), (40, 40))
    assert counters["stats"]["unique_graphs"] == graphs
    compiled.eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(compiled(images), plain.eval()(images), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_blocks_of_other_rates_share_their_graphs():
    plain, compiled = models("aot_eager", depths=(8,))
    same(plain, compiled, (32, 32))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_inductor_gives_the_same(fused):
    """The real compiler, with padding: a map of 10 x 10 in windows of 4."""
    plain, compiled = models("inductor", fused_attention=fused, depths=(2,))
    same(plain, compiled, (40, 40))
    assert not torch._dynamo.utils.counters["graph_break"]
