"""DeepSpeed's sizes follow from the model's layers, as the table in docs/engine.md says."""

from __future__ import annotations

import pytest
import torch

from swinv2_train.engine.deepspeed.buckets import Buckets, buckets_of
from swinv2_train.engine.model_sizes import LayerSizes, layer_sizes
from swinv2_train.models import SimMIM, swin_v2
from swinv2_train.models.initial import on_meta
from swinv2_train.models.swin_v2 import SwinBlock
from tests.support.toy import Toy, toy_config

# The last stage's block is 12 C^2 weights and a little more: 12 x 768^2 = 7.08 M in tiny, 201.3 M in giant.
# The largest vector or position-bias tensor is 512 x heads of the last stage.
TABLE = {
    "tiny": (7_100_952, 512 * 24, 170_770),
    "small": (7_100_952, 512 * 24, 318_370),
    "base": (12_613_152, 512 * 32, 420_064),
    "large": (28_356_144, 512 * 48, 562_012),
    "huge": (95_238_744, 512 * 88, 1_007_250),
    "giant": (201_442_944, 512 * 128, 3_111_624),
}


def derived(**given):
    nothing = dict.fromkeys(Buckets._fields)
    engine = toy_config().engine
    for key, value in {**nothing, **given}.items():
        setattr(engine, key, value)
    return engine


@pytest.mark.parametrize("size", TABLE)
def test_sizes_of_the_published_models(size):
    """And with a bias table so small, what stays gathered is little beside what is sharded."""
    with on_meta():
        model = swin_v2(size)
    sizes = layer_sizes(model, (SwinBlock,))
    assert sizes == TABLE[size]
    assert sizes.small < 0.01 * sum(p.numel() for p in model.parameters())
    for name, parameter in model.named_parameters():
        if "cpb_mlp" in name or parameter.ndim == 1 or "logit_scale" in name:
            assert parameter.numel() <= sizes.largest_vector, name
    block = sizes.largest_block
    assert buckets_of(derived(), sizes) == Buckets(
        reduce_bucket_size=min(block, 100_000_000),
        prefetch_bucket_size=block,
        persistence_threshold=sizes.largest_vector,
        max_reuse_distance=block,
        max_live_parameters=2 * block + sizes.small,
    )


def test_a_layer_outside_of_blocks_may_be_the_largest():
    """A head for very many classes is gathered as one too."""
    with on_meta():
        model = swin_v2("tiny", num_classes=21_841)
    assert layer_sizes(model, (SwinBlock,)).largest_block == 768 * 21_841 + 21_841
    with on_meta():
        simmim = SimMIM(swin_v2("tiny", num_classes=0))
    assert layer_sizes(simmim, (SwinBlock,)).largest_block == TABLE["tiny"][0]


def test_explicit_numbers_win_one_by_one():
    sizes = LayerSizes(100, 10, 30)
    assert buckets_of(derived(), sizes) == (100, 100, 10, 100, 230)
    assert buckets_of(derived(prefetch_bucket_size=0, max_live_parameters=7), sizes) == (100, 0, 10, 100, 7)


def test_any_module_has_sizes():
    assert layer_sizes(Toy(), ()) == (16 * 32 + 32, 32, sum(p.numel() for p in Toy().parameters() if p.numel() <= 32))
    assert layer_sizes(torch.nn.Linear(2, 3, bias=False), ()) == (6, 0, 0)
