"""The window attention in C++ against the reference in float64: outputs, all gradients, any sizes, any threads."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.cosine import window_attention
from swinv2_train.models.kernels import cpu_attention, dispatch
from swinv2_train.models.windows import window_grid
from tests.support.processes import same_with_threads

CPU = cpu_attention._processor()
pytestmark = pytest.mark.skipif(cpu_attention.problem() is not None, reason=str(cpu_attention.problem()))


def inputs(grid, heads, dim, batch=2, dtype=torch.float32, largest_scale=30.0, seed=0):
    """qkv, scale, table and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    offsets = math.prod(2 * length - 1 for length in grid.window)
    qkv = torch.randn(batch, *grid.size, 3 * heads * dim, generator=generator)
    scale = 1 + (largest_scale - 1) * torch.rand(heads, 1, 1, generator=generator)
    table = 16 * torch.rand(offsets, heads, generator=generator)
    grad = torch.randn(batch, *grid.size, heads * dim, generator=generator)
    return qkv.to(dtype), scale, table, grad.to(dtype)


def run(attention, qkv, scale, table, grad, grid, heads):
    """The output and the gradients of qkv, scale and table."""
    leaves = [x.detach().clone().requires_grad_() for x in (qkv, scale, table)]
    out = attention(*leaves, grid, heads)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def errors(found, expected):
    """Largest difference by the largest entry; a window of one token has gradients of 0.  Infinite where one is not a
    number, which max() would pass over."""
    return [
        ((a.double() - b).abs().max() / b.abs().max().clamp(min=1.0)).nan_to_num(nan=math.inf, posinf=math.inf).item()
        for a, b in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "window", "shifted", "heads", "dim"),
    [
        ((16, 16), (8, 8), False, 3, 32),
        ((16, 16), (8, 8), True, 3, 32),
        ((13, 17), (5, 7), True, 2, 24),
        ((24, 12), (12, 12), True, 1, 64),
        ((3, 40), (2, 32), True, 1, 128),
        ((7, 7), (7, 7), False, 5, 5),
        ((1, 3), (1, 1), False, 1, 16),
        ((17, 33), (16, 32), True, 1, 16),
        ((8, 8, 8), (4, 4, 4), True, 2, 32),  # clips from here on
        ((3, 7, 5), (2, 4, 3), True, 2, 24),
        ((5, 6, 4), (2, 6, 4), True, 3, 5),
        ((2, 9, 9), (2, 4, 4), False, 1, 16),
        ((4, 5, 6), (1, 3, 3), True, 1, 16),
    ],
)  # fmt: skip
def test_outputs_and_gradients_are_those_of_the_reference(dtype, size, window, shifted, heads, dim):
    """float32 within 3e-5 (measured worst 1e-5), bfloat16 within 2^-7; the gradient of scale, a sum that can cancel,
    within 1e-3 and 2^-6."""
    grid = window_grid(size, window, shifted)
    tensors = inputs(grid, heads, dim, dtype=dtype)
    expected = run(window_attention, *(x.double() for x in tensors), grid, heads)
    found = run(dispatch.fused_window_attention, *tensors, grid, heads)
    assert [x.dtype for x in found] == [dtype, dtype, torch.float32, torch.float32]
    out, d_qkv, d_scale, d_table = errors(found, expected)
    assert max(out, d_qkv, d_table) <= (3e-5 if dtype == torch.float32 else 2**-7)
    assert d_scale <= (1e-3 if dtype == torch.float32 else 2**-6)


def test_random_sizes():
    generator = torch.Generator().manual_seed(1)
    for seed in range(25):
        height, width, rows, cols, heads, dim = (
            int(torch.randint(1, most + 1, (1,), generator=generator)) for most in (20, 20, 9, 9, 4, 40)
        )
        grid = window_grid((height, width), (rows, cols), seed % 2 == 0)
        tensors = inputs(grid, heads, dim, batch=1 + seed % 3, seed=seed)
        expected = run(window_attention, *(x.double() for x in tensors), grid, heads)
        found = run(dispatch.fused_window_attention, *tensors, grid, heads)
        out, d_qkv, d_scale, d_table = errors(found, expected)
        assert max(out, d_qkv, d_table) <= 5e-5 and d_scale <= 1e-3, (grid, heads, dim)


def test_extreme_values():
    """The largest scale with equal and opposed vectors, tokens of zeros and of subnormal length, bias at both ends."""
    grid = window_grid((8, 8), (4, 4), True)
    qkv, scale, table, grad = inputs(grid, 2, 16)
    scale.fill_(100.0)
    table[::2], table[1::2] = 0.0, 16.0
    qkv[0, :4] = qkv[0, 0, 0]
    qkv[0, 4:6] = -qkv[0, 0, 0]
    qkv[1, 0, 0] = 0.0
    qkv[1, 1, 1] = 1e-30
    found = run(dispatch.fused_window_attention, qkv, scale, table, grad, grid, 2)
    expected = run(window_attention, qkv, scale, table, grad, grid, 2)
    assert all(x.isfinite().all() for x in found)
    out, d_qkv, d_scale, d_table = errors(found, [x.double() for x in expected])
    assert max(out, d_qkv, d_table) <= 3e-5 and d_scale <= 1e-3


def test_vectors_whose_square_is_beyond_float32_equal_normalize():
    """torch's normalize divides them by infinity: their unit vectors are 0, and so are their gradients."""
    grid, dim = window_grid((6, 5), (5, 5), True), 24
    qkv, scale, table, grad = inputs(grid, 1, dim)
    qkv[0, 0, 0, :dim] *= 1e19  # a query of a length of some 5e19
    qkv[0, 1, 2, dim : 2 * dim] *= 1e30  # a key
    qkv[1, 2, 1, : 2 * dim] *= 1e17  # a query and a key whose squares can be told
    expected = run(window_attention, qkv, scale, table, grad, grid, 1)  # float64 would know their lengths
    found = run(dispatch.fused_window_attention, qkv, scale, table, grad, grid, 1)
    assert all(x.isfinite().all() for x in found) and max(errors(found, expected)) <= 3e-5
    assert not found[1][0, 0, 0, :dim].any() and not found[1][0, 1, 2, dim : 2 * dim].any()
    qkv[0, 0, 0, 3] = torch.inf
    for attention in (window_attention, dispatch.fused_window_attention):
        assert attention(qkv, scale, table, grid, 1)[0, 0, 0].isnan().all()


def test_an_input_that_is_not_a_number_stays_in_its_window():
    grid = window_grid((8, 8), (4, 4), False)
    qkv, scale, table, _ = inputs(grid, 2, 16, batch=1)
    qkv[0, 1, 1] = float("nan")
    out = dispatch.fused_window_attention(qkv, scale, table, grid, 2)
    assert out[0, :4, :4].isnan().all() and out[0, 4:].isfinite().all() and out[0, :, 4:].isfinite().all()


def test_results_do_not_depend_on_the_number_of_threads():
    grid = window_grid((24, 24), (8, 8), True)
    tensors = inputs(grid, 3, 32)
    same_with_threads(lambda: run(dispatch.fused_window_attention, *tensors, grid, 3))


def test_inputs_that_are_not_contiguous_and_checkpointing():
    grid = window_grid((8, 8), (4, 4), True)
    qkv, scale, table, grad = inputs(grid, 2, 16)
    expected = run(dispatch.fused_window_attention, qkv, scale, table, grad, grid, 2)
    strided = qkv.transpose(1, 2).contiguous().transpose(1, 2)

    def recomputed(*arguments):
        return checkpoint(dispatch.fused_window_attention, *arguments, use_reentrant=False)

    for attention, x in ((dispatch.fused_window_attention, strided), (recomputed, qkv)):
        found = run(attention, x, scale, table, grad, grid, 2)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_dtypes_and_windows_that_it_does_not_know_fall_back():
    grid = window_grid((8, 8), (4, 4), True)
    qkv = torch.zeros(1, 8, 8, 96)
    assert dispatch.fused_available(qkv, grid, 2)
    for dtype in (torch.float64, torch.float16):
        assert not dispatch.fused_available(qkv.to(dtype), grid, 2)
    large = window_grid((64, 64), (33, 32), False)
    assert not dispatch.fused_available(qkv, large, 2)
    assert not dispatch.fused_available(torch.zeros(1, 8, 8, 3 * 144), grid, 1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_a_model_attends_by_it(precision):
    """Against the reference model: float32 within 1e-4 of the largest gradient (measured 2e-5)."""
    torch.manual_seed(0)
    settings = {"img_size": (24, 40), "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 5}
    settings |= {"num_classes": 3, "pretrained_window_sizes": (0, 0), "drop_path_rate": 0.0}
    reference, model = (SwinTransformerV2(**settings, fused_attention=use) for use in (False, True))
    for parameter in reference.parameters():  # blocks start as the identity
        torch.nn.init.normal_(parameter, std=0.2)
    model.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 24, 40)
    exact = reference.double()(images.double())
    exact.square().sum().backward()
    if precision == "bfloat16":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        out = model(images)
    out.float().square().sum().backward()
    bound = 1e-4 if precision == "float32" else 0.15
    assert (out.double() - exact).abs().max() <= bound * exact.abs().max()
    if precision == "float32":
        for (name, ours), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert (ours.grad.double() - expected.grad).abs().max() <= bound * expected.grad.abs().max(), name


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("CXX", "/none", "/none could not compile it"),
        ("CXX", "/bin/false", "/bin/false could not compile it"),
        ("PATH", "", "there is no C++ compiler"),
    ],
)
def test_machines_without_a_compiler(name, value, said, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(name, value)
    library, problem = cpu_attention._load.__wrapped__()
    assert library is None and said in problem


@pytest.mark.slow
def test_a_kernel_is_compiled_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu_attention._load.__wrapped__()[1] is None
    (kept,) = (tmp_path / "swinv2_train").iterdir()
    written = kept.stat().st_mtime_ns
    assert cpu_attention._load.__wrapped__()[1] is None and kept.stat().st_mtime_ns == written
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")  # cannot be written: compiled for this process alone
    assert cpu_attention._load.__wrapped__()[1] is None


@pytest.mark.parametrize("what", ["flags", "sources", "options"])
def test_a_kernel_of_another_processor_source_or_option_is_not_loaded(what, monkeypatch, tmp_path):
    """Homes are shared: a file compiled for AVX-512 must not even be opened where the processor does not report it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = cpu_attention._file(cpu_attention.cache_directory(), cpu_attention._fingerprint(["g++"]))
    ours.write_bytes(b"")
    if what == "flags":
        lines = [f"{line} avx4096" if line.startswith(("flags", "Features")) else line for line in CPU]
        assert lines != CPU
        monkeypatch.setattr(cpu_attention, "_processor", lambda: lines)
    elif what == "sources":
        copies = [tmp_path / path.name for path in cpu_attention.SOURCES]
        for copy, path in zip(copies, cpu_attention.SOURCES, strict=True):
            copy.write_text(path.read_text())
        copies[-1].write_text(copies[-1].read_text() + "\n")
        monkeypatch.setattr(cpu_attention, "SOURCES", copies)
    else:
        monkeypatch.setattr(cpu_attention, "FLAGS", [*cpu_attention.FLAGS, "-g"])
    opened = []
    monkeypatch.setattr(cpu_attention, "_kept", lambda path: opened.append(path))
    monkeypatch.setattr(cpu_attention, "_compile", lambda compiler, built: (_ for _ in ()).throw(OSError("not here")))
    assert cpu_attention._load.__wrapped__()[0] is None
    assert len(opened) == 1 and opened[0] != ours


def test_without_a_kernel_the_reference_serves(monkeypatch):
    monkeypatch.setattr(cpu_attention, "problem", lambda: "none here")
    torch.manual_seed(0)
    sizes = {"img_size": 16, "embed_dim": 16, "depths": (1,), "num_heads": (1,), "pretrained_window_sizes": (0,)}
    models = [SwinTransformerV2(**sizes, window_size=4, fused_attention=use) for use in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(*(model.eval()(images) for model in models))


@pytest.mark.slow
def test_meta_tensors_and_the_rules_of_torch_library():
    """The fake implementation and the real one give the same shapes and types."""
    grid = window_grid((9, 9), (4, 4), True)
    qkv, scale, table, grad = inputs(grid, 2, 16, dtype=torch.bfloat16)
    real = dispatch._forward(qkv, scale, table, grid.size, grid.window, grid.shift, 2)
    meta = dispatch._forward(*(x.to("meta") for x in (qkv, scale, table)), grid.size, grid.window, grid.shift, 2)
    assert [(x.shape, x.dtype) for x in real] == [(x.shape, x.dtype) for x in meta]
    torch.library.opcheck(
        dispatch._forward, (qkv.float().requires_grad_(), scale, table, grid.size, grid.window, grid.shift, 2)
    )


def test_the_plain_function_and_the_operation_are_the_same_bits():
    """What is launched without torch.library is what a compiler and the planner see."""
    grid = window_grid((9, 7), (4, 4), True)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(grid, 2, 16, dtype=dtype)

        def operation(qkv, scale, table, grid, heads):
            return dispatch._forward(qkv, scale, table, *grid, heads)[0]

        found, expected = (run(each, *tensors, grid, 2) for each in (dispatch.fused_window_attention, operation))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        with torch.no_grad():
            assert torch.equal(dispatch.fused_window_attention(*tensors[:3], grid, 2), expected[0])


def test_modes_and_compilers_see_one_operation():
    """A FakeTensorMode's tensors have no contents, and a dispatch mode, such as the planner's, sees operations."""
    grid = window_grid((8, 8), (4, 4), True)
    qkv, scale, table, _ = inputs(grid, 2, 16)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (qkv, scale, table)]
    assert dispatch.fused_window_attention(*fakes, grid, 2).shape == (2, 8, 8, 32)

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    with Names():
        dispatch.fused_window_attention(qkv, scale, table, grid, 2)
    assert names == ["swinv2_train.window_attention.default"]


def test_second_derivatives_are_refused():
    """The kernels know none: zeros without a word would be wrong."""
    grid = window_grid((4, 4), (4, 4), False)
    qkv, scale, table, _ = inputs(grid, 1, 16)
    out = dispatch.fused_window_attention(qkv.requires_grad_(), scale, table, grid, 1)
    (first,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
