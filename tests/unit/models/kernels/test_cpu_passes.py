"""The passes between a block's products against the same in float64: outputs, all gradients, any sizes, any threads."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.cosine import window_attention
from swinv2_train.models.fused_layers import ResidualLayerNorm
from swinv2_train.models.kernels import cpu_attention, cpu_passes, dispatch
from swinv2_train.models.lora import add_adapters
from swinv2_train.models.swin_v2 import Mlp
from swinv2_train.models.windows import window_grid
from tests.support.processes import same_with_threads

pytestmark = pytest.mark.skipif(cpu_attention.problem() is not None, reason=str(cpu_attention.problem()))
EPS = 1e-5
HALF = 2**-8
"""The rounding of a bfloat16, once: half a unit of the last of 8 digits."""


def plain_norm(branch, plus, residual, factors, weight, bias):
    normed = F.layer_norm(branch if plus is None else branch + plus, weight.shape, weight, bias, EPS)
    return residual + (normed if factors is None else normed * factors)


def plain_gelu(x, plus):
    return F.gelu(x + plus)


def one_pass(branch, plus, residual, factors, weight, bias):
    """Of factors no gradient is known."""
    return cpu_passes.add_norm(branch, plus, residual, None if factors is None else factors.detach(), weight, bias, EPS)


def run(function, tensors, grad, *rest):
    """The output, and the gradients of all tensors but factors, which alone are not as wide as the others."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, *rest)
    wanted = [x for x in leaves if x is not None and x.shape[-1] > 1]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def errors(found, expected):
    """Largest difference by the largest entry; infinite where one is not a number, which max() would pass over."""
    return [
        ((a.double() - b).abs().max() / b.abs().max()).nan_to_num(nan=math.inf, posinf=math.inf).item()
        for a, b in zip(found, expected, strict=True)
    ]


def double(tensors):
    return [None if x is None else x.double() for x in tensors]


def norm_tensors(shape, dropped, seed=0, offset=0.0):
    """branch, plus, residual, factors, weight, bias; and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator)

    factors = (torch.rand(shape[0], *(1 for _ in shape[1:]), generator=generator) > 0.4) / 0.6 if dropped else None
    branch = (0.1 + draw(*shape[:-1], 1).abs()) * draw(*shape) + offset
    plus = draw(shape[-1]) if dropped else None
    return [branch, plus, draw(*shape), factors, 1 + draw(shape[-1]), draw(shape[-1])], draw(*shape)


SHAPES = [
    (2, 8, 8, 96),
    (3, 5, 7, 16),
    (1, 1, 1, 48),
    (4, 3, 5, 2, 32),  # a clip
    (2, 40, 40, 128),  # more rows than chunks hold
    (5, 13, 1, 1024),
]


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_residual_are_those_of_float64(shape, dropped):
    """Within 4e-6 of the largest entry (measured worst 1e-6, which is torch's own as well)."""
    tensors, grad = norm_tensors(shape, dropped)
    expected = run(plain_norm, double(tensors), grad.double())
    assert max(errors(run(one_pass, tensors, grad), expected)) <= 4e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16_every_number_is_rounded_once(shape):
    """Of the numbers in float64 that come of the same bfloat16; torch's own operations round four times."""
    tensors, grad = norm_tensors(shape, True)
    tensors, grad = [None if x is None else x.bfloat16() for x in tensors], grad.bfloat16()
    found, expected = run(one_pass, tensors, grad), run(plain_norm, double(tensors), grad.double())
    assert all(x.dtype == torch.bfloat16 for x in found)
    assert max(errors(found, expected)) <= HALF
    x, plus, wide = tensors[0], tensors[1], grad
    found, expected = run(cpu_passes.gelu, [x, plus], wide), run(plain_gelu, double([x, plus]), wide.double())
    for ours, right in zip(found, expected, strict=True):
        assert ((ours.double() - right).abs() <= HALF * right.abs() + 1e-5).all()


def test_a_branch_far_from_zero_keeps_its_digits():
    """Two passes over a row: E[x^2] - E[x]^2 would have nothing left of the variance."""
    tensors, grad = norm_tensors((2, 4, 4, 64), False, offset=1000.0)
    expected = run(plain_norm, double(tensors), grad.double())
    plain, found = (max(errors(run(each, tensors, grad), expected)) for each in (plain_norm, one_pass))
    assert found <= 2 * plain


def gelu_and_slope(gelu, x):
    """(n,) each: at every number alone."""
    x = x.clone().view(-1, 16).requires_grad_()
    y = gelu(x)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach().flatten(), slope.flatten()


def test_the_gelu_at_all_sizes_of_numbers_is_as_near_as_torchs():
    x = torch.cat((torch.linspace(-16, 16, 160_000), torch.logspace(-38, 4, 4_000), -torch.logspace(-38, 4, 4_000)))
    size = x.double().abs().clamp(min=1.0)
    for found, torch_found, expected in zip(
        gelu_and_slope(cpu_passes.gelu, x), gelu_and_slope(F.gelu, x), gelu_and_slope(F.gelu, x.double()), strict=True
    ):
        ours, torchs = (((each.double() - expected).abs() / size).max().item() for each in (found, torch_found))
        assert ours <= max(torchs, 1.2e-7), (ours, torchs)


def test_the_gelus_ends_are_the_formulas():
    """Infinite and not a number, and both zeros.  Torch's own of infinity depends on the processor's vectors."""
    x = torch.tensor([math.inf, math.nan, -1e30, 1e30, -40.0, 40.0, 0.0, -0.0, *(0.5 for _ in range(8))])

    def formula(x):
        return x * (0.5 * (1 + torch.erf(x / math.sqrt(2))))

    for found, expected in zip(gelu_and_slope(cpu_passes.gelu, x), gelu_and_slope(formula, x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7, equal_nan=True), (found, expected)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 24), (1, 5)])
def test_the_gelu_of_any_shape_and_gradient(shape):
    """Odd channels are torch's; without gradients it is the same."""
    x, grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.randn(shape)
    plus = torch.randn(shape[-1])
    found = run(cpu_passes.gelu, [x, plus], grad)
    assert max(errors(found, run(plain_gelu, double([x, plus]), grad.double()))) <= 1e-6
    with torch.no_grad():
        assert torch.equal(cpu_passes.gelu(x, plus), found[0])
    assert torch.equal(cpu_passes.gelu(x), cpu_passes.gelu(x, torch.zeros_like(plus)))


def plain_table(first, bias, second, coordinates):
    return 16 * torch.sigmoid((coordinates @ first.t() + bias).relu() @ second.t())


def table_pass(first, bias, second, coordinates):
    return cpu_passes.position_table(coordinates, first, bias, second, 16.0)


def table_tensors(window, heads, hidden=512):
    """The MLP's layers, the gradient of the table, and the offsets' coordinates, of which the second is zero."""
    generator = torch.Generator().manual_seed(0)
    offsets = math.prod(2 * length - 1 for length in window)
    sizes = ((hidden, len(window)), (hidden,), (heads, hidden), (offsets, heads), (offsets, len(window)))
    *layers, grad, coordinates = (torch.randn(size, generator=generator) for size in sizes)
    layers[2] *= hidden**-0.5
    coordinates[1:2] = 0
    return layers, grad, 4 * coordinates


TABLES = [((8, 8), 3), ((12, 12), 32), ((2, 3), 5), ((1, 1), 1), ((4, 8, 8), 4)]


@pytest.mark.parametrize(("window", "heads"), TABLES)
def test_the_position_table_is_that_of_float64(window, heads):
    """Within 4e-6 of the largest entry (measured worst 7e-7, torch's own 1e-6); of the bfloat16 layers, which are
    rounded no further, the same table, and gradients rounded once."""
    layers, grad, coordinates = table_tensors(window, heads)
    expected = run(plain_table, double(layers), grad.double(), coordinates.double())
    found = run(table_pass, layers, grad, coordinates)
    assert max(errors(found, expected)) <= 4e-6
    with torch.no_grad():
        assert torch.equal(table_pass(*layers, coordinates), found[0])
    half = [x.bfloat16() for x in layers]
    table, *gradients = run(table_pass, half, grad, coordinates)
    right, *rights = run(plain_table, double(half), grad.double(), coordinates.double())
    assert table.dtype == torch.float32 and all(x.dtype == torch.bfloat16 for x in gradients)
    assert max(errors([table], [right])) <= 4e-6 and max(errors(gradients, rights)) <= HALF


def test_a_position_table_at_its_ends():
    """Biases of 0 and 16, and not a number where a layer holds none."""
    layers, _, coordinates = table_tensors((2, 2), 2, hidden=16)
    layers = [layers[0] * 1e3, layers[1], layers[2] * 1e3]
    assert torch.allclose(table_pass(*layers, coordinates), plain_table(*layers, coordinates), rtol=1e-5, atol=1e-30)
    layers[1][3] = math.nan
    assert table_pass(*layers, coordinates).isnan().all()


def test_results_do_not_depend_on_the_number_of_threads():
    tensors, grad = norm_tensors((2, 40, 40, 64), True)
    layers, of_table, coordinates = table_tensors((12, 12), 7)

    def all_of_them():
        found = run(one_pass, tensors, grad) + run(cpu_passes.gelu, [tensors[0], tensors[1]], grad)
        return found + run(table_pass, layers, of_table, coordinates)

    same_with_threads(all_of_them)


def test_strided_inputs_recomputation_and_a_second_backward_pass():
    """What the forward pass keeps is as it was after a backward pass."""
    norm, mlp = ResidualLayerNorm(32), Mlp(32, 64)
    torch.nn.init.normal_(norm.weight)

    def block(x):
        branch, bias = mlp(x, True)
        return norm(branch, x, None, True, bias)

    def gradients(function, x):
        x = x.detach().requires_grad_()
        out = function(x)
        parameters = [x, *norm.parameters(), *mlp.parameters()]
        first, second = (torch.autograd.grad(out.square().sum(), parameters, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        return [out, *first]

    x = torch.randn(2, 6, 5, 32)
    expected = gradients(block, x)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    for function, given in ((block, strided), (lambda x: checkpoint(block, x, use_reentrant=False), x)):
        assert all(torch.equal(a, b) for a, b in zip(gradients(function, given), expected, strict=True))


def test_what_the_passes_do_not_serve(monkeypatch):
    """Other types, odd channels, autocast, no compiler; and whoever is to see each operation sees torch's own."""
    x, weight = torch.zeros(2, 32), torch.zeros(32)
    assert cpu_passes.serves(x, weight)
    assert cpu_passes.serves(x.bfloat16(), weight.bfloat16())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert not cpu_passes.serves(x.to(dtype), weight)
        assert not cpu_passes.serves(x, weight.to(dtype))
    assert not cpu_passes.serves(x.half(), weight.half())
    assert not cpu_passes.serves(torch.zeros(2, 40), weight) and not cpu_passes.serves(x[:0], weight)
    assert not cpu_passes.serves(x.to("meta"), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu_passes.serves(x, weight)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert not cpu_passes.serves(fake, weight)
    with TorchDispatchMode():
        assert not cpu_passes.serves(x, weight)
    monkeypatch.setattr(cpu_attention, "problem", lambda: "none here")
    assert not cpu_passes.serves(x, weight)


def test_second_derivatives_are_refused():
    x, weight = torch.randn(2, 3, 32, requires_grad=True), torch.ones(32)
    table = cpu_passes.position_table(torch.ones(4, 2), x[0, 0, :, None].expand(-1, 2), weight, weight[None], 16.0)
    for out in (cpu_passes.add_norm(x, None, x, None, weight, weight, EPS), cpu_passes.gelu(x), table):
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


@pytest.mark.parametrize(
    ("size", "window", "heads", "dim"),
    [((16, 16), (8, 8), 3, 32), ((13, 17), (5, 7), 2, 24), ((7, 7), (7, 7), 5, 5), ((3, 7, 5), (2, 4, 3), 2, 24)],
)
def test_the_attention_kernel_adds_the_bias_of_queries_keys_and_values(size, window, heads, dim):
    """Its gradient of all three, and nothing of padding, which has no bias."""
    grid = window_grid(size, window, True)
    generator = torch.Generator().manual_seed(0)
    qkv, bias, grad = (
        torch.randn(*sizes, generator=generator)
        for sizes in ((2, *size, 3 * heads * dim), (3 * heads * dim,), (2, *size, heads * dim))
    )
    scale, table = torch.full((heads, 1, 1), 10.0), torch.rand(math.prod(2 * n - 1 for n in window), heads)

    def apart(qkv, scale, table, bias):
        return dispatch.fused_window_attention(qkv, scale, table, grid, heads, bias)

    def before(qkv, scale, table, bias):
        return window_attention(qkv + bias, scale, table, grid, heads)

    tensors = [qkv, scale, table, bias]
    expected = run(before, double(tensors), grad.double())
    found = run(apart, tensors, grad)
    assert max(errors(found, expected)) <= 1e-4
    with torch.no_grad():
        assert torch.equal(apart(*tensors), found[0])
    half = [x.bfloat16() if x is qkv or x is bias else x for x in tensors]
    expected = run(before, double(half), grad.bfloat16().double())
    found = run(apart, half, grad.bfloat16())
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]
    assert max(errors(found, expected)) <= HALF


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_with_stochastic_depth_and_adapters_computes_by_them(adapted, monkeypatch):
    """With the random numbers and, to 1e-4 of the largest gradient, the numbers of before."""
    settings = {"img_size": 32, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    settings |= {"num_classes": 3, "pretrained_window_sizes": (0, 0), "drop_path_rate": 0.5, "fused_attention": True}
    torch.manual_seed(0)
    model = SwinTransformerV2(**settings)
    if adapted:
        add_adapters(model, 2, 4.0, ("qkv", "fc1", "fc2"))
    for parameter in model.parameters():  # blocks start as the identity
        torch.nn.init.normal_(parameter, std=0.2)
    images, called = torch.randn(6, 3, 32, 32), []
    call = cpu_passes._call
    monkeypatch.setattr(cpu_passes, "_call", lambda name, *rest: (called.append(name), call(name, *rest)))

    def step():
        torch.manual_seed(1)
        model.zero_grad()
        out = model(images)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    found = step()
    assert called.count("add_norm_forward") == called.count("add_norm_backward") == 8
    assert called.count("gelu_forward") == called.count("gelu_backward") == 4
    assert called.count("position_table_forward") == 4
    assert called.count("position_table_backward") == (0 if adapted else 4)  # adapters alone are trained
    monkeypatch.setattr(cpu_passes, "serves", lambda *_: False)
    expected = step()
    assert len(called) == (28 if adapted else 32)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
