"""The patch embedding and SimMIM's decoder: convolutions in name, shape and value, products of matrices in fact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from swinv2_train.models import SimMIM, SwinTransformerV2
from swinv2_train.models.patch_conv import PatchConv2d


@pytest.mark.parametrize(
    ("batch", "channels", "out", "patch", "rows", "cols"),
    [(2, 3, 8, 4, 3, 5), (1, 1, 3, 2, 7, 1), (3, 5, 6, 1, 4, 3), (1, 4, 2, 3, 1, 1)],
)
@pytest.mark.parametrize("last", [False, True])
def test_equals_the_convolution_in_value_and_gradients(batch, channels, out, patch, rows, cols, last):
    torch.manual_seed(0)
    layer = PatchConv2d(channels, out, patch).double()
    x = torch.randn(batch, channels, rows * patch, cols * patch, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    inputs = (x, layer.weight, layer.bias)
    ours, theirs = layer(x), F.conv2d(*inputs, stride=patch)
    grad = torch.randn_like(theirs)
    assert ours.shape == theirs.shape == (batch, out, rows, cols)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-12)


def test_holds_the_parameters_of_the_convolution_with_the_same_values_to_start_from():
    torch.manual_seed(3)
    ours = PatchConv2d(3, 16, 4).state_dict()
    torch.manual_seed(3)
    theirs = nn.Conv2d(3, 16, kernel_size=4, stride=4).state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


class _Names(TorchDispatchMode):
    """The operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
def test_a_training_step_runs_no_convolution(fused):
    """cuDNN's gradients of one need not be the same twice."""
    encoder = SwinTransformerV2(
        img_size=32,
        embed_dim=8,
        depths=(1,) * 4,
        num_heads=(1,) * 4,
        window_size=4,
        num_classes=0,
        fused_attention=fused,
    )
    model = SimMIM(encoder, encoder_stride=32, norm_target=7)
    mask = torch.rand(2, 8, 8) > 0.5
    with _Names() as names:
        model(torch.randn(2, 3, 32, 32), mask)["loss"].backward()
    assert "addmm" in names.found and not [name for name in names.found if "conv" in name]
