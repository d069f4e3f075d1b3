"""Models of every kind for the tests, and how they are compared with the independent float64 reference."""

from __future__ import annotations

import pytest
import torch

from swinv2_train.models import SwinTransformerV2
from tests.support.reference_swin_v2 import reference_features

FLOAT64_BOUND = 1e-10  # of the largest entry; measured worst 9e-12, in a gradient; float32 inside gives 7e-5


def random_model(**settings) -> SwinTransformerV2:
    """A float64 model whose norms and scales are not at their initial values, so that every term counts."""
    torch.manual_seed(0)
    model = SwinTransformerV2(drop_path_rate=0.0, num_classes=0, **settings).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.5 * torch.randn_like(parameter))
            if "logit_scale" in name:
                parameter.copy_(torch.linspace(1.0, 6.0, parameter.numel()).view_as(parameter))  # some above log 100
    return model


# Maps of 4 to 1,440 tokens.  A stage's map is the image divided by patch_size, halved (rounded up) from stage to stage.
CASES = {
    "square, window 8": {"img_size": 128, "patch_size": 4, "window_size": 8},
    "192x256, window 12 does not divide 32": {"img_size": (192, 256), "patch_size": 8, "window_size": 12},
    "128x256, window 8": {"img_size": (128, 256), "patch_size": 8, "window_size": 8},
    "256x128, window 16 as large as one side": {"img_size": (256, 128), "patch_size": 8, "window_size": 16},
    "window 24 does not divide 32": {"img_size": 256, "patch_size": 8, "window_size": 24},
    "window 32 as large as the map": {"img_size": 256, "patch_size": 8, "window_size": 32},
    "window 32 does not divide 40x36": {"img_size": (640, 576), "patch_size": 16, "window_size": 32},
    "window larger than every map": {"img_size": 16, "window_size": 12},
    "window of one token": {"img_size": 8, "window_size": 1},
    "odd maps 13x19, 7x10, 4x5": {
        "img_size": (26, 38), "window_size": 4, "depths": (2, 2, 2), "num_heads": (1, 2, 2),
    },
    "odd maps 9x5, 5x3, 3x2, 2x1": {
        "img_size": (18, 10), "window_size": 3, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4),
    },
    "four stages": {
        "img_size": 64, "window_size": 4, "depths": (1, 2, 3, 2), "num_heads": (1, 2, 4, 4),
    },
    "window 2x6": {"img_size": (16, 48), "window_size": (2, 6), "depths": (2, 1)},
    "window 3x5 divides nothing": {"img_size": (32, 48), "window_size": (3, 5)},
    "pretrained windows": {"img_size": 32, "window_size": 8, "pretrained_window_sizes": (4, 12)},
    "pretrained windows per axis, one 0": {
        "img_size": (16, 48), "window_size": (4, 6), "pretrained_window_sizes": ((3, 9), (0, 5)),
    },
    "extra norms": {"img_size": 16, "window_size": 4, "depths": (5, 2), "extra_norm_period": 2},
    "no biases of queries and values": {"img_size": 24, "window_size": 5, "qkv_bias": False},
    "shorter side: 8x24, 4x12": {"img_size": (16, 48), "window_size": 8, "clamp_to_shorter_side": True},
    "shorter side: 20x12, 10x6": {"img_size": (40, 24), "window_size": 8, "clamp_to_shorter_side": True},
}  # fmt: skip

# Clips: every axis clamped, shifted and padded, alone and together.  (T, H, W) in the names are the first map's.
CLIP_CASES = {
    "4x8x8, window 2x4x4": {"frames": 4, "img_size": 16, "window_frames": 2, "window_size": 4},
    "8x4x4, window 8x4x4 takes all": {"frames": 8, "img_size": 8, "window_frames": 8, "window_size": 4},
    "patches of 2 frames": {"frames": 8, "patch_frames": 2, "img_size": 16, "window_frames": 2, "window_size": 4},
    "5 frames, window 2 does not divide them": {"frames": 5, "img_size": 12, "window_frames": 2, "window_size": 3},
    "odd maps 3x7x5": {"frames": 3, "img_size": (14, 10), "window_frames": 2, "window_size": 4},
    "time alone is shifted": {"frames": 6, "img_size": 8, "window_frames": 4, "window_size": 8},
    "sides alone are shifted": {"frames": 2, "img_size": 16, "window_frames": 8, "window_size": 4},
    "windows of one frame": {"frames": 3, "img_size": 16, "window_frames": 1, "window_size": 4},
    "one frame": {"frames": 1, "img_size": 16, "window_frames": 8, "window_size": 4},
    "pretrained windows of all axes": {
        "frames": 4, "img_size": (16, 12), "window_frames": 4, "window_size": (4, 3),
        "pretrained_window_sizes": ((3, 9), (0, 5)), "pretrained_window_frames": 7,
    },
    "extra norms, three stages": {
        "frames": 4, "img_size": 16, "window_frames": 2, "window_size": 3, "extra_norm_period": 2,
        "depths": (2, 2, 2), "num_heads": (1, 2, 2),
    },
}  # fmt: skip

QUICK_AND_SLOW = [pytest.param(case, marks=pytest.mark.slow) if "40x36" in case else case for case in CASES]
"""CASES for parametrize: the map of 1440 tokens takes seconds."""


def settings_of(case: str) -> dict:
    settings = {"patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), **(CASES | CLIP_CASES)[case]}
    settings.setdefault("pretrained_window_sizes", (0,) * len(settings["depths"]))
    return settings


def reference_of(model: SwinTransformerV2, settings: dict, state: dict, images, mask=None) -> list[torch.Tensor]:
    patch, window, pretrained = settings["patch_size"], model.window_size, settings["pretrained_window_sizes"]
    if "frames" in settings:
        patch = (settings.get("patch_frames", 1), patch, patch)
        window = (settings["window_frames"], *window)
        pairs = [(given, given) if isinstance(given, int) else given for given in pretrained]
        pretrained = [(settings.get("pretrained_window_frames", 0), *pair) for pair in pairs]
    return reference_features(
        state,
        images,
        patch=patch,
        depths=settings["depths"],
        heads=settings["num_heads"],
        window=window,
        pretrained=pretrained,
        norm_period=settings.get("extra_norm_period", 0),
        mask=mask,
        clamp_to_shorter_side=settings.get("clamp_to_shorter_side", False),
    )


def gradients_of(maps: list[torch.Tensor], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of a random weighting of all maps, by name; the same weighting for every caller.

    A map's own mean is 1.
    """
    generator = torch.Generator().manual_seed(1)
    probes = [torch.randn(m.shape, generator=generator, dtype=torch.float64).to(m.dtype) for m in maps]
    total = sum((m * p).sum() for m, p in zip(maps, probes, strict=True))
    return dict(zip(inputs, torch.autograd.grad(total, list(inputs.values()), materialize_grads=True), strict=True))


def relative_error(got: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Largest difference, over the largest expected entry (or the floor)."""
    largest = max(expected.abs().max().item(), floor)
    difference = (got.double() - expected.double()).abs().max().item()
    return difference / largest if difference else 0.0
