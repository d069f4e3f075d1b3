"""The augmentation of supervised training: RandAugment, colour jitter, random erasing, mixup and cutmix.

What is drawn for an image is a function of its sample's random numbers; what is drawn for a micro-batch, of a seed.
RandAugment and mixup are timm's own (data/auto_augment.py, data/mixup.py).  Those two files know Pillow, numpy and
torch alone, so they are loaded by themselves: timm as a whole takes seconds to import.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from swinv2_train.config import ConfigError

if TYPE_CHECKING:
    from PIL import Image

ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
"""Share of the image, and height over width, of a box of random erasing: [low, high] (arXiv:1708.04896 section 4.1)."""


def check_augment(rand_augment: str | None, mixes: bool) -> None:
    """Load what augmentation is drawn from: a policy of timm's, where one is named, and mixup, where images are mixed.

    Raises ConfigError where that is not installed, or where a policy draws more different operations than it has.
    """
    if rand_augment is not None:
        policy = _timm("auto_augment").rand_augment_transform(rand_augment)
        if policy.choice_weights is not None and policy.num_layers > len(policy.ops):  # drawn without replacement
            raise ConfigError(
                f"task.rand_augment ({rand_augment}) draws {policy.num_layers} different operations of an image, "
                f"but its weighted set has {len(policy.ops)}; use n{len(policy.ops)} or less"
            )
    if mixes:
        _timm("mixup")


# --------------------------------------------------------------------------------------------------------------------
# One image, in a worker process


def rand_augment(
    image: Tensor, policy: str, mean: Sequence[float], interpolation: str, rng: np.random.Generator
) -> Tensor:
    """A few random operations out of a policy of timm's (arXiv:1909.13719): uint8 (3, H, W) -> (3, H, W).

    policy: such as rand-m9-mstd0.5-inc1; mean: of the data, pixels in 0..1, what shifted images are filled with;
    interpolation: bilinear or bicubic.  Settings as timm's create_transform passes them.
    """
    apply = _policy(policy, (image.shape[-2], image.shape[-1]), tuple(mean), interpolation)
    with _seeded(int(rng.integers(2**32))):
        return _tensor(apply(_picture(image)))


def color_jitter(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast and saturation times a factor each, in random order: uint8 (3, H, W) -> (3, H, W).

    torchvision's ColorJitter(strength, strength, strength): uniform in max(0, 1 - strength) to 1 + strength.
    """
    from PIL import ImageEnhance

    picture = _picture(image)
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=len(kinds))
    for number in rng.permutation(len(kinds)):
        picture = kinds[number](picture).enhance(float(factors[number]))
    return _tensor(picture)


def _picture(image: Tensor) -> Image.Image:
    from PIL import Image

    return Image.merge("RGB", [Image.fromarray(channel) for channel in image.numpy()])  # a quarter of permute's time


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in picture.split()]))


@functools.lru_cache(maxsize=8)
def _policy(policy: str, size: tuple[int, int], mean: tuple[float, ...], interpolation: str) -> Callable[..., Any]:
    from PIL import Image

    settings = {
        "translate_const": int(min(size) * 0.45),
        "img_mean": tuple(min(255, max(0, round(255 * value))) for value in mean),
        "interpolation": Image.Resampling[interpolation.upper()],
    }
    return _timm("auto_augment").rand_augment_transform(policy, settings)


# --------------------------------------------------------------------------------------------------------------------
# Random erasing: the box is drawn in a worker process, its noise on the device


class Erasing(NamedTuple):
    """A box of an image, in pixels, and the seed of the noise that fills it."""

    top: int
    left: int
    height: int
    width: int
    seed: int


def draw_erasing(height: int, width: int, probability: float, rng: np.random.Generator) -> Erasing | None:
    """The box to erase of an image of height x width pixels; None = none.

    timm's RandomErasing: its area and its aspect (on a log scale) are uniform, and of ten tries the first is taken that
    is smaller than the image on both sides.
    """
    if rng.random() >= probability:
        return None
    low, high = (math.log(value) for value in ERASED_ASPECT)
    for _ in range(10):
        area, aspect = height * width * rng.uniform(*ERASED_AREA), math.exp(rng.uniform(low, high))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < height and columns < width:
            top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
            return Erasing(top, left, rows, columns, int(rng.integers(2**63)))
    return None


def erase(images: Tensor, boxes: Sequence[Erasing | None]) -> None:
    """Fill a box of each image, where it has one, with N(0, 1) per pixel and channel, in place.

    images: (B, 3, H, W), normalised.  The noise is another on another kind of device.
    """
    generator = torch.Generator(images.device)
    for number, box in enumerate(boxes):
        if box is not None:
            rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
            images[number, :, rows, columns].normal_(generator=generator.manual_seed(box.seed))


# --------------------------------------------------------------------------------------------------------------------
# Mixing: on the device


@dataclass(frozen=True)
class Mixing:
    """Mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899) of each image with the one at its place from the end.

    timm's Mixup in its mode "batch": one draw for the micro-batch.  The fields are keys of conf/task/classify.yaml.
    """

    mixup_alpha: float
    cutmix_alpha: float
    mixup_prob: float
    mixup_switch_prob: float

    def __call__(self, images: Tensor, seed: int) -> Tensor:
        """Mix images (B, 3, H, W), B even, in place; returns (B,): how much of each is still the image of its place.

        The rest of image i is image B - 1 - i.  seed: 0 to 2^32 - 1.
        """
        count = len(images)
        mixup = _timm("mixup").Mixup(
            mixup_alpha=self.mixup_alpha,
            cutmix_alpha=self.cutmix_alpha,
            prob=self.mixup_prob,
            switch_prob=self.mixup_switch_prob,
            mode="batch",
            label_smoothing=0.0,
            num_classes=count,
        )
        with _seeded(seed):  # every image is a class of its own, so the mixed targets are the shares: (B, B)
            shares: Tensor = mixup(images, torch.arange(count, device=images.device))[1]
        return shares.diagonal()


# --------------------------------------------------------------------------------------------------------------------
# timm


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators of Python and numpy, which timm draws from, begin at seed and are put back at the end."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


@functools.cache
def _timm(name: str) -> ModuleType:
    """One file of timm's data package.  Raises ConfigError where there is none."""
    package = importlib.util.find_spec("timm")  # does not import it
    folders = package.submodule_search_locations if package is not None else None
    path = Path(folders[0]) / "data" / f"{name}.py" if folders else None
    spec = importlib.util.spec_from_file_location(f"timm_data_{name}", path) if path and path.is_file() else None
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"task.rand_augment, task.mixup_alpha and task.cutmix_alpha need timm, of which data/{name}.py is not "
            "installed: pip install 'timm>=1.0.31,<2', or set "
            "task.rand_augment=null task.mixup_alpha=0 task.cutmix_alpha=0"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
