"""bf16: weights as DeepSpeed keeps them, and torch.autocast.  What stays in float32, and how far the results move."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from swinv2_train.models import SimMIM, swin_v2
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.cosine import unit_vectors
from swinv2_train.models.precision import Float32LayerNorm
from tests.support.model_cases import random_model, reference_of, settings_of

MODES = ("weights", "autocast")


def autocast(mode: str):
    return torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext()


class Operations(TorchDispatchMode):
    """Remembers (operation, dtype and shape of its first tensors) of everything that is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[torch.dtype], list[torch.Size]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        self.seen.append((function.overloadpacket.__name__, [t.dtype for t in tensors], [t.shape for t in tensors]))
        return function(*args, **(kwargs or {}))

    def dtypes(self, *names: str, width: int | None = None) -> set[torch.dtype]:
        """Dtypes of these operations' inputs, or of those with a matrix that is `width` columns wide or rows high."""
        return {
            dtype
            for name, dtypes, shapes in self.seen
            for dtype in dtypes
            if name in names and (width is None or any(width in shape for shape in shapes))
        }


@pytest.mark.parametrize("mode", MODES)
def test_bias_scale_softmax_and_norms_are_computed_in_float32(mode):
    """As the operations themselves say: sigmoid (position bias), exp (logit scale), softmax, layer norm, vector norm,
    and the matrix products of the bias MLP, which autocast rounds unless it is turned off."""
    model = SimMIM(swin_v2("demo", img_size=24, num_classes=0, window_size=4, pretrained_window_sizes=(0, 0)), 8)
    if mode == "weights":
        model.bfloat16()
    images, mask = torch.randn(2, 3, 24, 24), torch.rand(2, 6, 6) < 0.5
    with autocast(mode), Operations() as operations, torch.no_grad():
        model(images, mask)
    for name in ("sigmoid", "exp", "_softmax", "native_layer_norm", "linalg_vector_norm"):
        assert operations.dtypes(name) == {torch.float32}, name
    assert operations.dtypes("addmm", "mm", width=512) == {torch.float32}  # the bias MLP's hidden width
    assert operations.dtypes("addmm", "mm", width=3 * 96) == operations.dtypes("bmm") == {torch.bfloat16}


def test_autocast_keeps_the_main_branch_in_float32_and_bf16_weights_do_not():
    model = swin_v2("demo", img_size=16, num_classes=0, window_size=4, pretrained_window_sizes=(0, 0))
    with torch.autocast("cpu", torch.bfloat16):
        assert {m.dtype for m in model.forward_features(torch.randn(1, 3, 16, 16))} == {torch.float32}
    assert {m.dtype for m in model.bfloat16().forward_features(torch.randn(1, 3, 16, 16))} == {torch.bfloat16}


# Of the norm of the last map; measured worst 0.0048 and 0.0032 (autocast keeps the main branch in float32).
BF16_BOUNDS = {"weights": 0.01, "autocast": 0.007}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["square, window 8", "odd maps 13x19, 7x10, 4x5", "extra norms"])
def test_bf16_stays_near_float64(case, mode):
    """Against the independent reference, whose weights are the rounded ones where the model's are."""
    settings = settings_of(case)
    model = random_model(**settings).float()
    if mode == "weights":
        model.bfloat16()
    images = torch.randn(2, 3, *model.img_size).bfloat16().float()
    state = {name: p.detach().double() for name, p in model.named_parameters()}
    expected = reference_of(model, settings, state, images.double())[-1]
    with autocast(mode), torch.no_grad():
        got = model.forward_features(images)[-1]
    error = (got.double() - expected).norm() / expected.norm()
    assert error < BF16_BOUNDS[mode], f"{error:.4f}"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_bf16_gradients_stay_near_those_of_float32(mode):
    """torch's own bf16 CPU LayerNorm loses most of its bias gradient over many tokens, which this bound catches
    (measured worst 0.008 with bf16 weights, with torch's norm 0.10, and 0.008 under autocast)."""
    model = swin_v2(
        "demo", img_size=32, window_size=4, num_classes=10, pretrained_window_sizes=(0, 0), drop_path_rate=0.0
    )
    images = torch.randn(64, 3, 32, 32) + 1
    labels = torch.arange(64) % 10

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images).float(), labels).backward()
        return {name: p.grad.float().clone() for name, p in model.named_parameters()}

    expected = gradients()
    if mode == "weights":
        model.bfloat16()
    with autocast(mode):
        got = gradients()
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, exact in expected.items():
        if exact.norm() > 1e-3 * total:
            error = (got[name] - exact).norm() / exact.norm()
            assert error < 0.03, f"{name}: {error:.3f}"


def test_bf16_norm_keeps_its_bias_gradient():
    """The measured fault of torch's bf16 CPU kernel, alone: 8,192 tokens of gradient 1 must sum to 8,192."""
    norm = Float32LayerNorm(8).bfloat16()
    norm(torch.randn(8192, 8).bfloat16()).backward(torch.ones(8192, 8).bfloat16())
    assert torch.equal(norm.bias.grad.float(), torch.full((8,), 8192.0))


@pytest.mark.parametrize(
    ("device", "weights", "input_dtype", "computed"),
    [
        ("cuda", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("cuda", torch.float32, torch.bfloat16, torch.float32),  # as under autocast
        ("cuda", torch.bfloat16, torch.float32, torch.float32),
        ("cpu", torch.bfloat16, torch.bfloat16, torch.float32),
        ("meta", torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_norms_are_native_on_cuda_alone(device, weights, input_dtype, computed):
    """By the device that a tensor says it is on, without one: fake tensors, which torch.compile traces with too."""
    with FakeTensorMode():
        norm = Float32LayerNorm(8, device=device, dtype=weights)
        x = torch.randn(3, 8, device=device, dtype=input_dtype)
        with Operations() as operations:
            out = norm(x)
    assert out.dtype == weights and out.device.type == device
    assert operations.dtypes("native_layer_norm") == {computed}


def test_on_meta_a_norm_takes_the_path_of_the_device_that_it_stands_for():
    norm = Float32LayerNorm(8, device="meta", dtype=torch.bfloat16)
    norm.meta_stands_for = "cpu"
    with Operations() as operations:
        norm(torch.zeros(3, 8, device="meta", dtype=torch.bfloat16))
    assert operations.dtypes("native_layer_norm") == {torch.float32}


@pytest.mark.parametrize("mode", MODES)
def test_position_bias_is_that_of_float32(mode):
    """16 sigmoid(.) in bf16 has steps of 0.06.  The bias is the same bits as that of float32 with the same weights."""
    attention = WindowAttention(32, 2, (4, 4))
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(parameter.bfloat16().float())
    expected = attention.position_bias((4, 4), torch.device("cpu"))
    with autocast(mode):
        got = attention.to(torch.bfloat16 if mode == "weights" else torch.float32).position_bias(
            (4, 4), torch.device("cpu")
        )
    assert got.dtype == torch.float32 and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_vector_of_zeros_has_no_direction_and_no_gradient_of_nan(dtype):
    """Padded keys are such vectors; in float16 alone the lower bound of the length underflows to 0."""
    x = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
    unit = unit_vectors(x)
    unit.backward(torch.zeros_like(unit))
    assert not unit.any() and not x.grad.any() and unit.dtype == dtype
