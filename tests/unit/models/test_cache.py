"""The tables that follow from sizes: kept within bounds, and never mixed up."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from swinv2_train.models import SwinTransformerV2
from swinv2_train.models.attention import WindowAttention
from swinv2_train.models.cache import TABLES, TableCache, cached_table

CPU = torch.device("cpu")


def small_model(**settings) -> SwinTransformerV2:
    return SwinTransformerV2(
        **{"img_size": 32, "patch_size": 2, "num_classes": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2),
           "window_size": 4, "pretrained_window_sizes": (0, 0), **settings}
    )  # fmt: skip


def test_the_table_used_longest_ago_leaves_first():
    cache = TableCache(max_bytes=100, max_entries=3)
    built = []

    def table(key: str, nbytes: int = 10) -> None:
        cache.get(key, lambda: built.append(key) or torch.zeros(nbytes, dtype=torch.uint8))

    for key in ("a", "b", "c", "a", "d", "a", "b"):  # d drives b out, and b then c
        table(key)
    assert built == ["a", "b", "c", "d", "b"] and len(cache) == 3 and cache.nbytes == 30
    table("large", 90)  # bytes: d and a leave
    assert len(cache) == 2 and cache.nbytes == 100
    table("b")
    assert built[-1] == "large"


def test_a_table_larger_than_the_bound_is_not_kept_and_drives_nothing_out():
    """The mask of stage 1 at 1536 px and window 32 takes 604 MB."""
    cache = TableCache(max_bytes=100, max_entries=3)
    cache.get("small", lambda: torch.zeros(60, dtype=torch.uint8))
    for _ in range(2):
        assert cache.get("huge", lambda: torch.ones(101, dtype=torch.uint8)).sum() == 101
    assert len(cache) == 1 and cache.nbytes == 60


def test_a_hundred_image_sizes_stay_within_the_bounds():
    """Variable sizes in a long run must not fill the memory."""
    model = small_model()
    with torch.no_grad():
        for height in range(10, 30, 2):
            for width in range(10, 30, 2):
                model(torch.randn(1, 3, height, width))
    assert len(TABLES) <= TABLES.max_entries == 256
    assert TABLES.nbytes == sum(table.nbytes for table in TABLES._tables.values()) <= TABLES.max_bytes == 256 * 2**20


def test_functions_do_not_share_tables():
    """The same arguments mean something else to each."""
    zeros, ones = cached_table(torch.zeros), cached_table(torch.ones)
    assert not zeros(3).any() and ones(3).all() and zeros(3) is zeros(3)


def test_tables_made_in_inference_mode_serve_training():
    """Tensors of inference mode must not take part in a backward pass."""
    model = small_model(window_size=(3, 5))  # a size that no other test has
    with torch.inference_mode():
        model(torch.randn(1, 3, 14, 22))
    model(torch.randn(1, 3, 14, 22)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_dtypes_do_not_share_tables():
    """float32 coordinates in a float64 model would cost nine digits."""
    single, double = WindowAttention(8, 2, (7, 7)), WindowAttention(8, 2, (7, 7)).double()
    double.load_state_dict(single.state_dict())
    rounded = single.position_bias((7, 7), CPU)
    exact = double.position_bias((7, 7), CPU)
    assert rounded.dtype == torch.float32 and exact.dtype == torch.float64
    assert 0 < (rounded - exact).abs().max() < 1e-5
    assert torch.equal(single.position_bias((7, 7), CPU), rounded)


def test_devices_do_not_share_tables():
    """A pass on the meta device, as planning makes it, and then a real one."""
    model = small_model(window_size=(5, 3))
    with torch.device("meta"):
        shapes = small_model(window_size=(5, 3))
    assert shapes(torch.randn(1, 3, 18, 26, device="meta")).shape == (1, 2)
    assert model(torch.randn(1, 3, 18, 26)).isfinite().all()


@pytest.mark.slow
def test_tables_made_in_an_export_are_not_kept_for_others():
    """A fake tensor in the cache would be taken by every later forward pass of that size."""
    model = small_model(window_size=3).eval()
    images = torch.randn(1, 3, 26, 26)  # a size that no other test uses
    torch.export.export(model, (images,))
    torch.jit.trace(model, images)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(images)
    assert type(model(images)) is torch.Tensor
