"""CUDA's own LayerNorm in bfloat16 and float16 against float64: statistics and sums must be those of float32.

The CPU's is not (models/precision.py), so what makes a norm native on CUDA is shown here.  Skipped without a device.
"""

from __future__ import annotations

import pytest
import torch

from swinv2_train.models.precision import Float32LayerNorm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def norm_and_gradients(norm, x, grad):
    x = x.detach().requires_grad_()
    norm.zero_grad()
    out = norm(x)
    out.backward(grad)
    return [out.detach(), x.grad, norm.weight.grad, norm.bias.grad]


# Few and many tokens beside few channels: the kernels share the sums of the gradients out in other ways.
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "channels"), [(37, 96), (8192, 96), (300_000, 128), (147_456, 512), (9216, 3072)])
def test_native_norm_has_the_digits_of_float32(tokens, channels, dtype, compiled):
    """Within the rounding of what is read and written: 2^-8 (bf16) or 2^-11 (fp16) of the largest entry.  A bias
    gradient that is summed in bfloat16 loses seven eighths of 8,192 ones, and more of more."""
    torch.manual_seed(0)
    norm = Float32LayerNorm(channels).to("cuda", dtype)
    with torch.no_grad():
        norm.weight.add_(0.2 * torch.randn_like(norm.weight))
        norm.bias.add_(0.2 * torch.randn_like(norm.bias))
    x = (3 + torch.randn(tokens, channels, device="cuda")).to(dtype)  # a mean that is not 0: statistics must be exact
    grad = (0.01 + 0.01 * torch.randn(tokens, channels, device="cuda")).to(dtype)
    exact = torch.nn.LayerNorm(channels).to("cuda", torch.float64)
    exact.load_state_dict(norm.state_dict())
    expected = norm_and_gradients(exact, x.double(), grad.double())
    found = norm_and_gradients(torch.compile(norm) if compiled else norm, x, grad)
    bound = 2**-8 if dtype == torch.bfloat16 else 2**-11
    for name, ours, right in zip(("output", "input", "weight", "bias"), found, expected, strict=True):
        error = ((ours.double() - right).abs().max() / right.abs().max()).item()
        assert ours.dtype == dtype and error <= bound, (name, error)


def test_a_native_norm_copies_nothing_to_float32():
    """What the backward pass keeps is the input as it is and two float32 numbers a token."""
    norm, tokens = Float32LayerNorm(512).to("cuda", torch.bfloat16), 4096
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x)
    assert {t.data_ptr() for t in kept if t.numel() == x.numel()} == {x.data_ptr()}
    assert sum(t.nbytes for t in kept if t.dtype == torch.float32) == 8 * tokens
