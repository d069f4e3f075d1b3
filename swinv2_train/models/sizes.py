"""The published sizes of SwinV2, and the demo's own."""

from __future__ import annotations

from typing import Any

from swinv2_train.models.swin_v2 import SwinTransformerV2

# Channels and depths: arXiv:2111.09883 section 3.6 (giant: the paper's 3.0 B model, last stage 4 deep).
# Heads of huge and giant are not printed there; a head dimension of 32 everywhere gives these.
# demo: small enough to learn CIFAR-10 on two CPU cores in minutes; two stages, because 32 px images need no more.
SIZES: dict[str, dict[str, Any]] = {
    "demo": {
        "embed_dim": 96, "depths": (2, 4), "num_heads": (3, 6), "extra_norm_period": 0,
        "img_size": 32, "window_size": 4, "pretrained_window_sizes": (0, 0),
    },
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "extra_norm_period": 0},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "extra_norm_period": 0},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "extra_norm_period": 0},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "extra_norm_period": 0},
    "huge": {"embed_dim": 352, "depths": (2, 2, 18, 2), "num_heads": (11, 22, 44, 88), "extra_norm_period": 6},
    "giant": {"embed_dim": 512, "depths": (2, 2, 42, 4), "num_heads": (16, 32, 64, 128), "extra_norm_period": 6},
}  # fmt: skip


def swin_v2(size: str, **overrides: Any) -> SwinTransformerV2:
    """Build the model of a published size; keyword arguments replace any constructor argument.

    Raises ValueError when there is no such size.  Source: arXiv:2111.09883 section 3.6.
    """
    if size not in SIZES:
        raise ValueError(f"no SwinV2 size {size!r}; there are: {', '.join(SIZES)}")
    return SwinTransformerV2(**{**SIZES[size], **overrides})
