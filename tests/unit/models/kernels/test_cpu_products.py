"""Products through oneDNN's door against the same in float64, and where they serve; on any processor that has both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.kernels import cpu_products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch):
    """As on a processor where MKL is slow, and products of any size."""
    monkeypatch.setattr(cpu_products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(cpu_products, "LEAST", 1)


def run(function, tensors, grad):
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], grad)]


@pytest.mark.parametrize("vectors", ["AVX512", "AVX2"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        ((2, 8, 8, 96), 288),
        ((3, 17, 5, 7), 3),
        ((4, 3, 6, 5, 40), 24),
        ((19, 64), 1),
        ((34, 1), 9),
        ((1, 8), 8),
        ((2, 24, 24, 32), 96),
        ((2, 24, 24, 96), 32),
        ((1, 1031, 16), 8),
    ],
)
def test_output_and_gradients_are_those_of_float64(shape, outputs, bias, vectors, monkeypatch):
    """Within 2e-6 of the largest entry; both ways of a weight's gradient, to the wider side and to the narrower."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    x, weight, grad = torch.randn(shape), torch.randn(outputs, shape[-1]), torch.randn(*shape[:-1], outputs)
    assert cpu_products.serves(x, weight)
    tensors = [x, weight, torch.randn(outputs) if bias else None]
    expected = run(F.linear, [None if x is None else x.double() for x in tensors], grad.double())
    for ours, right in zip(run(cpu_products.linear, tensors, grad), expected, strict=True):
        assert ours.shape == right.shape and ours.is_contiguous()
        assert (ours.double() - right).abs().max() <= 2e-6 * right.abs().max()


def test_strided_maps_frozen_weights_and_no_gradients():
    x, weight = torch.randn(6, 32, 10).transpose(1, 2), torch.randn(16, 32)
    x = x.repeat(3, 1, 1).transpose(0, 1)
    expected = F.linear(x, weight)
    torch.testing.assert_close(cpu_products.linear(x, weight), expected)
    for wanted in (x, weight):
        leaf = wanted.detach().requires_grad_()
        tensors = [leaf if each is wanted else each for each in (x, weight)]
        (found,) = torch.autograd.grad(cpu_products.linear(*tensors).square().sum(), leaf)
        (right,) = torch.autograd.grad(F.linear(*tensors).square().sum(), leaf)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-3)


def test_second_derivatives():
    x, weight = torch.randn(20, 8, dtype=torch.float32, requires_grad=True), torch.randn(6, 8, requires_grad=True)

    def penalty(linear):
        (first,) = torch.autograd.grad(linear(x, weight).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, weight))

    for found, right in zip(penalty(cpu_products.linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-3)


def test_what_goes_by_torchs_own_products(monkeypatch):
    """Other types, autocast, small products, other processors, whoever looks on."""
    x, weight = torch.zeros(34, 32), torch.zeros(8, 32)
    assert cpu_products.serves(x, weight)
    assert not cpu_products.serves(x.double(), weight.double()) and not cpu_products.serves(x.bfloat16(), weight)
    assert not cpu_products.serves(x.to("meta"), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu_products.serves(x, weight)
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert not cpu_products.serves(x, weight)
    assert cpu_products.linear(x[:0], weight).shape == (0, 8)
    monkeypatch.setattr(cpu_products, "LEAST", 34 * 32 * 8 + 1)
    assert not cpu_products.serves(x, weight)
    monkeypatch.setattr(cpu_products, "LEAST", 1)
    monkeypatch.setattr(cpu_products, "mkl_is_slow", lambda: False)
    assert not cpu_products.serves(x, weight)


def small_model():
    torch.manual_seed(0)
    return SwinTransformerV2(
        img_size=48, embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=6, num_classes=3,
        pretrained_window_sizes=(0, 0), drop_path_rate=0.0,
    )  # fmt: skip


def test_every_layer_of_a_model_asks_and_the_numbers_are_those_of_torch(monkeypatch):
    model, images, served, apply = small_model(), torch.randn(6, 3, 48, 48), [], cpu_products._Linear.apply
    monkeypatch.setattr(cpu_products._Linear, "apply", lambda *given: (served.append(1), apply(*given))[1])

    def step():
        model.zero_grad()
        out = model(images)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    found = step()
    assert len(served) == 2 * 4 + 1  # qkv, proj, fc1 and fc2 of each block, and the merging
    monkeypatch.setattr(cpu_products, "mkl_is_slow", lambda: False)
    expected = step()
    assert len(served) == 9
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_torch_jit_holds_torchs_operations_alone():
    model, images = small_model().eval(), torch.randn(6, 3, 48, 48)
    with torch.no_grad():
        traced = torch.jit.trace(model, images)
        assert "PythonOp" not in str(traced.inlined_graph) and "mkldnn::" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(images), model(images))
