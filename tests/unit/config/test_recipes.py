"""Every experiment file is the recipe that its sources print: a table written by hand beside what the files compose to.

The numbers come from the papers and the authors' files (arXiv:2111.09883, microsoft/Swin-Transformer, microsoft/SimMIM;
each experiment file names its own), worked out with pencil and formula and not by the package:

- parameters: a block of width D with h heads has 12 D^2 + 12 D + h + 1,536 + 512 h, a patch embedding 51 C, a merging
  8 D^2 + 4 D, the last norm 16 C, an extra norm 2 D; a head of n classes 8 C n + n, SimMIM's C + 8 C x 3,072 + 3,072;
- steps: epochs x images / batch, rounded up; warm-up alike;
- lr: what is printed per 512 images times batch / 512; a straight line up, then a cosine over the rest, or a tenth from
  epoch 700 of 800 on;
- tensors: 17 a block, of which 4 decay; 4 in the patch embedding (1), 3 a merging (1), 2 in the last norm (0), 2 an
  extra norm (0), 2 in a classifier (1), 3 with SimMIM's token and decoder (1); UPerNet has 12 convolutions with a norm
  (3 each, 1 decays), a norm for each of three maps (2, 0) and its classes (2, 1), the auxiliary head one convolution
  and its classes: 15 that decay and 34 that do not;
- detectors (docs of models/detection/): norms of three maps 14 C; a pyramid's 8 convolutions, 256 (15 C + 4) + 4 x 256
  (9 x 256 + 1); its anchors 593,935; per stage four 3 x 3 convolutions without bias and their norms, 49 x 256 x 1,024 +
  1,024, and n + 1 classes and 4 n sides (4 where they are of any class) of 1,025 each; per mask head 2,643,280 with 80
  classes; 65,792 for each of HTC's two ways between mask heads.  coco_cascade_tiny_3x: 27,578,154 + 1,344 + 2,729,984 +
  593,935 + 3 x 15,618,449 + 3 x 2,643,280 = 85,688,604.  HTC's L: 253,683,366 - 3 x 316 x 1,025 + 2 x 65,792; G on
  Objects365: 3,057,557,394 - 3 x 2,643,280 - 3 x 316 x 1,025 + 3 x 285 x 1,025;
- their tensors: 3 norms (6, 0); pyramid 8 and anchors 3 convolutions (22, 11 decay); Mask R-CNN's box head 4 matrices
  (8, 4), a cascade's stage 4 convolutions with norms and 3 matrices (18, 7); a mask head 6 (12, 6); a way of HTC's 1;
- clips: 512 more a block, 48 C more in a patch embedding of two frames; Video Swin's lr starts at a tenth, ends at 0;
- poly: lr (1 - step / steps), at step 0 a millionth of lr, at the end of the warm-up lr (1 - warm-up / steps).
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from swinv2_train.config import ClassifyConfig, Config, DetectConfig, SegmentConfig, SimMIMConfig, TaskConfig
from swinv2_train.config.command_line import compose_argv
from swinv2_train.config.conf_dir import conf_dir
from swinv2_train.models.counts import count_parameters
from swinv2_train.models.initial import on_meta
from swinv2_train.tasks import build_task
from swinv2_train.training.lr_schedule import lr_at, total_steps, warmup_steps
from swinv2_train.training.param_groups import build_param_groups

FILES = conf_dir() / "experiment"
EXPERIMENTS = sorted(path.stem for path in FILES.glob("*.yaml"))

IN1K = 1_281_167  # ILSVRC 2012, training
IN22K = 14_197_122  # ImageNet's statistics of fall 2011: 21,841 synsets
IN22K_EXT = 70_000_000  # arXiv:2111.09883 section 4.1: "70 million images"
SATVISION = 1_920_000  # an epoch of arXiv:2411.17000
CIFAR10 = 50_000
ADE20K = 20_210  # its training images
COCO = 117_266  # of train2017, those with objects
OBJECTS365 = 1_742_289  # of version 2, training
K400 = 240_436  # mmaction2's copy of its training clips
BATCHES = {
    IN1K: {576, 1024, 2048}, IN22K: {4096}, IN22K_EXT: {9216}, SATVISION: {2048}, CIFAR10: {128, 256},
    ADE20K: {16, 32, 64}, COCO: {16, 64, 96}, OBJECTS365: {96}, K400: {64, 80},
}  # fmt: skip


class Run(NamedTuple):
    """Length, learning rate and regularisation, which recipes of one kind share."""

    images: int
    steps: int
    warmup: int
    lrs: tuple[float, float, float, float]
    """At step 0, at the end of the warm-up, at step steps // 2, at the last step."""
    weight_decay: float
    clip: float


class Recipe(NamedTuple):
    run: Run
    size: str
    parameters: int
    img_size: int | list[int]
    window: int
    pretrained: tuple[int, ...]
    """() where no stage is told another window than its own."""
    drop_path: float
    tensors: tuple[int, int]
    """That decay, and that do not."""
    layer_decay: float = 1.0
    layers: int = 0
    """With layer decay: blocks + 2, each with a group that decays and one that does not."""
    head: int | None = None
    """Classes; None = SimMIM."""
    norm_target: int | None = None
    augment: str = "official"
    """RandAugment, erasing, mixup and cutmix (official), without the last two (erasing), or none of them."""
    clip: tuple[int, int, int, int] | None = None
    """Frames, frames of a patch, window along time, frames from one to the next; None = images."""
    encoder_lr: float = 1.0
    """The encoder's learning rate as a share of the heads'."""
    after: str | None = None
    """The experiment whose run it starts from."""


SIMMIM_100 = Run(IN1K, 62_557, 6_256, (4e-6, 8e-4, 4.860002e-4, 4e-5), 0.05, 5.0)
SIMMIM_800 = Run(IN1K, 500_456, 6_256, (2e-6, 4e-4, 4e-4, 4e-5), 0.05, 5.0)
CONTINUE = Run(IN1K, 31_279, 3_128, (5e-7, 2e-4, 1.215024e-4, 1e-5), 0.05, 5.0)
SIMMIM_G = Run(IN22K_EXT, 151_910, 30_000, (0.0, 1.4e-3, 9.638944e-4, 0.0), 0.1, 100.0)
SIMMIM_SATVISION = Run(SATVISION, 46_875, 9_375, (4e-4, 1.2e-3, 1.2e-3, 1.2e-3), 0.05, 5.0)
SCRATCH_22K = Run(IN22K, 311_949, 17_331, (1e-6, 1e-3, 5.506769e-4, 1e-5), 0.1, 5.0)
SECOND_STAGE_G = Run(IN22K_EXT, 227_865, 20_000, (0.0, 1.4e-3, 8.053983e-4, 0.0), 0.1, 100.0)
SCRATCH_1K = Run(IN1K, 375_342, 25_023, (1e-6, 1e-3, 5.604229e-4, 1e-5), 0.05, 5.0)
AFTER_SIMMIM = Run(IN1K, 62_557, 12_512, (1e-6, 5e-3, 3.457144e-3, 1.000005e-6), 0.05, 5.0)
AFTER_22K = Run(IN1K, 37_535, 6_256, (4e-8, 4e-5, 2.631967e-5, 4e-7), 1e-8, 5.0)
AFTER_22K_G = Run(IN1K, 22_243, 4_449, (0.0, 2.1e-5, 1.451946e-5, 0.0), 0.1, 100.0)
ADE20K_ABLATION = Run(ADE20K, 160_000, 1_500, (4e-11, 3.9625e-5, 2e-5, 2.5e-10), 0.05, 0.0)
ADE20K_L = Run(ADE20K, 40_000, 375, (6e-11, 5.94375e-5, 3e-5, 1.5e-9), 0.05, 0.0)
ADE20K_G = Run(ADE20K, 80_000, 750, (4e-11, 3.9625e-5, 2e-5, 5e-10), 0.05, 0.0)
COCO_1X = Run(COCO, 87_950, 500, (1e-7, 1e-4, 1e-4, 1e-6), 0.05, 0.0)
COCO_3X = Run(COCO, 263_849, 500, (1e-7, 1e-4, 1e-4, 1e-6), 0.05, 0.0)
COCO_L = Run(COCO, 65_963, 500, (4e-7, 4e-4, 4e-4, 4e-6), 0.05, 0.0)
OBJECTS365_G = Run(OBJECTS365, 67_500, 500, (1.2e-6, 1.2e-3, 1.2e-3, 1.2e-5), 0.05, 0.0)
COCO_G = Run(COCO, 45_000, 500, (6e-7, 6e-4, 6e-4, 6e-6), 0.05, 0.0)
VIDEO_TS = Run(K400, 112_705, 9_393, (1e-4, 1e-3, 5.711725e-4, 0.0), 0.02, 0.0)
VIDEO_B = Run(K400, 112_705, 9_393, (1e-4, 1e-3, 5.711725e-4, 0.0), 0.05, 0.0)
VIDEO_L = Run(K400, 112_705, 9_393, (3e-5, 3e-4, 1.713517e-4, 0.0), 0.05, 0.0)
VIDEO_G1 = Run(K400, 60_109, 7_514, (0.0, 3.6e-4, 2.200613e-4, 0.0), 0.1, 100.0)
VIDEO_G2 = Run(K400, 18_785, 3_757, (0.0, 5e-5, 3.45695e-5, 0.0), 0.1, 100.0)
DEMO_SIMMIM = Run(CIFAR10, 586, 98, (1e-6, 2e-3, 1.31369e-3, 1.002062e-5), 0.05, 5.0)
PROOF_SIMMIM = Run(CIFAR10, 2_344, 98, (1e-6, 2e-3, 1.073143e-3, 1.000097e-5), 0.05, 5.0)
PROOF_FINETUNE = Run(CIFAR10, 2_344, 50, (1e-6, 2e-3, 1.039059e-3, 1.000093e-5), 0.05, 5.0)
DEMO_FINETUNE = Run(CIFAR10, 1_172, 98, (1e-6, 2e-3, 1.147127e-3, 1.000426e-5), 0.05, 5.0)

T, S, B, L, H, G = 28_347_154, 49_728_418, 87_918_816, 196_739_932, 658_036_370, 3_001_940_680  # with 1,000 classes
FROM_12 = (12, 12, 12, 6)

RECIPES = {
    "cifar10_simmim": Recipe(DEMO_SIMMIM, "demo", 2_143_326, 32, 4, (), 0.0, (27, 87)),
    "cifar10_finetune": Recipe(
        DEMO_FINETUNE, "demo", 2_108_104, 32, 4, (), 0.0, (27, 86), head=10, augment="none", after="cifar10_simmim"
    ),
    "cifar10_proof_simmim": Recipe(PROOF_SIMMIM, "demo", 2_143_326, 32, 4, (), 0.0, (27, 87)),
    "cifar10_proof_finetune": Recipe(
        PROOF_FINETUNE, "demo", 2_108_104, 32, 4, (), 0.0, (27, 86), head=10, augment="none", after="cifar10_simmim"
    ),
    "simmim_base_192": Recipe(SIMMIM_100, "base", 90_042_744, 192, 12, (), 0.0, (101, 325)),
    "simmim_large_192": Recipe(SIMMIM_100, "large", 199_924_788, 192, 12, (), 0.0, (101, 325)),
    "simmim_huge_192": Recipe(SIMMIM_100, "huge", 663_873_546, 192, 12, (), 0.0, (101, 331)),
    "simmim_base_192_800ep": Recipe(
        SIMMIM_800, "base", 90_042_744, 192, 12, (), 0.1, (101, 325), norm_target=47
    ),
    "simmim_large_192_800ep": Recipe(
        SIMMIM_800, "large", 199_924_788, 192, 12, (), 0.0, (101, 325), norm_target=47
    ),
    "simmim_huge_192_800ep": Recipe(
        SIMMIM_800, "huge", 663_873_546, 192, 12, (), 0.0, (101, 331), norm_target=47
    ),
    "simmim_giant_192": Recipe(SIMMIM_G, "giant", 3_010_430_176, 192, 12, (), 0.0, (205, 677)),
    "simmim_satvision_giant_128": Recipe(  # 14 bands: 227 C for 51 C, 14,336 for 3,072; 2 blocks for 4 in stage 4
        SIMMIM_SATVISION, "giant", 2_653_783_008, 128, 8, (), 0.1, (197, 651)
    ),
    "continue_simmim_base_192": Recipe(
        CONTINUE, "base", 90_042_744, 192, 12, (), 0.0, (101, 325), after="simmim_base_192"
    ),
    "continue_simmim_tiny_256": Recipe(
        CONTINUE, "tiny", 29_940_618, 256, 8, (), 0.0, (53, 169), after="in1k_tiny_256_w8"
    ),
    "in22k_base_192": Recipe(SCRATCH_22K, "base", 109_280_841, 192, 12, (), 0.2, (101, 324), head=21_841),
    "in22k_large_192": Recipe(SCRATCH_22K, "large", 228_772_549, 192, 12, (), 0.2, (101, 324), head=21_841),
    "in22k_giant_192": Recipe(
        SECOND_STAGE_G, "giant", 3_087_326_257, 192, 12, (), 0.3, (205, 676), 0.87, 52, 21_841,
        augment="erasing", after="simmim_giant_192",
    ),
    "in1k_tiny_256_w8": Recipe(SCRATCH_1K, "tiny", T, 256, 8, (), 0.2, (53, 168), head=1000),
    "in1k_tiny_256_w16": Recipe(SCRATCH_1K, "tiny", T, 256, 16, (), 0.2, (53, 168), head=1000),
    "in1k_small_256_w8": Recipe(SCRATCH_1K, "small", S, 256, 8, (), 0.3, (101, 324), head=1000),
    "in1k_small_256_w16": Recipe(SCRATCH_1K, "small", S, 256, 16, (), 0.3, (101, 324), head=1000),
    "in1k_base_256_w8": Recipe(SCRATCH_1K, "base", B, 256, 8, (), 0.5, (101, 324), head=1000),
    "in1k_base_256_w16": Recipe(SCRATCH_1K, "base", B, 256, 16, (), 0.5, (101, 324), head=1000),
    "finetune_base_192": Recipe(
        AFTER_SIMMIM, "base", B, 192, 12, (), 0.1, (101, 324), 0.9, 26, 1000, after="simmim_base_192"
    ),
    "finetune_base_224": Recipe(
        AFTER_SIMMIM, "base", B, 224, 14, FROM_12, 0.1, (101, 324), 0.75, 26, 1000, after="simmim_base_192_800ep"
    ),
    "finetune_large_224": Recipe(
        AFTER_SIMMIM, "large", L, 224, 14, FROM_12, 0.2, (101, 324), 0.7, 26, 1000, after="simmim_large_192_800ep"
    ),
    "finetune_huge_224": Recipe(
        AFTER_SIMMIM, "huge", H, 224, 14, FROM_12, 0.2, (101, 330), 0.7, 26, 1000, after="simmim_huge_192_800ep"
    ),
    "finetune_huge_512": Recipe(
        AFTER_SIMMIM, "huge", H, 512, 32, FROM_12, 0.2, (101, 330), 0.7, 26, 1000, after="simmim_huge_192_800ep"
    ),
    "in22k_to_in1k_base_256": Recipe(
        AFTER_22K, "base", B, 256, 16, FROM_12, 0.2, (101, 324), head=1000, after="in22k_base_192"
    ),
    "in22k_to_in1k_base_384": Recipe(
        AFTER_22K, "base", B, 384, 24, FROM_12, 0.2, (101, 324), head=1000, after="in22k_base_192"
    ),
    "in22k_to_in1k_large_256": Recipe(
        AFTER_22K, "large", L, 256, 16, FROM_12, 0.2, (101, 324), head=1000, after="in22k_large_192"
    ),
    "in22k_to_in1k_large_384": Recipe(
        AFTER_22K, "large", L, 384, 24, FROM_12, 0.2, (101, 324), head=1000, after="in22k_large_192"
    ),
    "in22k_to_in1k_giant_640": Recipe(
        AFTER_22K_G, "giant", G, 640, 40, FROM_12, 0.5, (205, 676), 0.87, 52, 1000,
        augment="erasing", after="in22k_giant_192",
    ),
    "giant_1536": Recipe(
        AFTER_22K_G, "giant", G, 1536, 32, FROM_12, 0.5, (205, 676), 0.87, 52, 1000,
        augment="erasing", after="in22k_giant_192",
    ),
    "ade20k_upernet_tiny_512": Recipe(
        ADE20K_ABLATION, "tiny", 60_000_662, 512, 16, (8, 8, 8, 8), 0.3, (67, 201), 0.95, 14, 150,
        after="in1k_tiny_256_w8",
    ),
    "ade20k_upernet_small_512": Recipe(
        ADE20K_ABLATION, "small", 81_381_926, 512, 16, (8, 8, 8, 8), 0.3, (115, 357), 0.95, 26, 150,
        after="in1k_small_256_w8",
    ),
    "ade20k_upernet_base_512": Recipe(
        ADE20K_ABLATION, "base", 121_430_308, 512, 16, (8, 8, 8, 8), 0.3, (115, 357), 0.95, 26, 150,
        after="in1k_base_256_w8",
    ),
    "ade20k_upernet_large_640": Recipe(
        ADE20K_L, "large", 233_967_392, 640, 40, FROM_12, 0.3, (115, 357), 0.95, 26, 150, after="in22k_large_192"
    ),
    "ade20k_upernet_giant_640": Recipe(
        ADE20K_G, "giant", 3_057_747_980, 640, 40, FROM_12, 0.4, (219, 709), 0.95, 52, 150, after="in22k_giant_192"
    ),
    "coco_mask_rcnn_tiny_1x": Recipe(
        COCO_1X, "tiny", 47_853_402, 1024, 16, (8, 8, 8, 8), 0.1, (73, 194), head=80, after="in1k_tiny_256_w8"
    ),
    "coco_cascade_tiny_3x": Recipe(
        COCO_3X, "tiny", 85_688_604, 1024, 16, (8, 8, 8, 8), 0.2, (102, 235), head=80, after="in1k_tiny_256_w8"
    ),
    "coco_cascade_small_3x": Recipe(
        COCO_3X, "small", 107_069_868, 1024, 16, (8, 8, 8, 8), 0.2, (150, 391), head=80, after="in1k_small_256_w8"
    ),
    "coco_cascade_base_3x": Recipe(
        COCO_3X, "base", 145_127_594, 1024, 16, (8, 8, 8, 8), 0.3, (150, 391), head=80, after="in1k_base_256_w8"
    ),
    "coco_htc_large_1536": Recipe(
        COCO_L, "large", 252_843_250, 1536, 32, FROM_12, 0.2, (152, 393), head=80, encoder_lr=0.1,
        after="in22k_large_192",
    ),
    "objects365_htc_giant_1536": Recipe(
        OBJECTS365_G, "giant", 3_049_532_229, [800, 1024], 32, FROM_12, 0.4, (236, 725), head=365, encoder_lr=0.1,
        after="in22k_giant_192",
    ),
    "coco_htc_giant_1536": Recipe(
        COCO_G, "giant", 3_056_717_278, 1536, 32, FROM_12, 0.4, (256, 745), head=80, encoder_lr=0.1,
        after="objects365_htc_giant_1536",
    ),
    "k400_tiny_256": Recipe(
        VIDEO_TS, "tiny", 27_896_506, 256, 8, (), 0.1, (53, 168), head=400, augment="none", clip=(32, 2, 8, 2),
        encoder_lr=0.1, after="in1k_tiny_256_w8",
    ),
    "k400_small_256": Recipe(
        VIDEO_TS, "small", 49_283_914, 256, 8, (), 0.1, (101, 324), head=400, augment="none", clip=(32, 2, 8, 2),
        encoder_lr=0.1, after="in1k_small_256_w8",
    ),
    "k400_base_256": Recipe(
        VIDEO_B, "base", 87_322_248, 256, 8, (), 0.3, (101, 324), head=400, augment="none", clip=(32, 2, 8, 2),
        encoder_lr=0.1, after="in1k_base_256_w8",
    ),
    "k400_large_256": Recipe(
        VIDEO_L, "large", 195_839_236, 256, 16, FROM_12, 0.4, (101, 324), head=400, augment="none", clip=(32, 2, 8, 2),
        encoder_lr=0.1, after="in22k_large_192",
    ),
    "k400_giant_256": Recipe(
        VIDEO_G1, "giant", 2_999_508_080, 256, 16, FROM_12, 0.4, (205, 676), head=400, augment="none",
        clip=(8, 1, 8, 8), encoder_lr=0.1, after="in22k_giant_192",
    ),
    "k400_giant_320": Recipe(
        VIDEO_G2, "giant", 2_999_508_080, 320, 20, FROM_12, 0.4, (205, 676), head=400, augment="none",
        clip=(8, 1, 8, 8), encoder_lr=0.1, after="k400_giant_256",
    ),
}  # fmt: skip

SATVISION_LOW = [
    0, 0, 0, 0, 0, 223.1222, 0, 178.9174, 204.3739, 204.7677, 194.8686, 202.1759, 201.3823, 203.3537
]  # fmt: skip
"""Reflectance in percent, brightness temperatures in kelvin: what becomes 0, and below what becomes 1."""
SATVISION_HIGH = [
    100, 100, 100, 100, 100, 352.7182, 100, 261.2920, 282.5529, 319.0373, 295.0209, 324.0677, 321.5254, 285.9848
]  # fmt: skip

WHOLE_IMAGE = {
    "in22k_to_in1k_base_384", "in22k_to_in1k_large_384", "in22k_to_in1k_giant_640", "finetune_huge_512", "giant_1536"
}  # fmt: skip
"""Evaluated as the authors evaluate at 384 px (TEST.CROP False)."""

AUGMENT = {  # RandAugment, erasing, mixup, cutmix
    "official": ("rand-m9-mstd0.5-inc1", 0.25, 0.8, 1.0),
    "erasing": ("rand-m9-mstd0.5-inc1", 0.25, 0.0, 0.0),
    "none": (None, 0.0, 0.0, 0.0),
}


@functools.cache
def compose(*overrides: str) -> Config:
    """The configuration of a command line, with what is always the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", "data.shards=x.tar", "run_dir=r", *overrides])
        config = compose_argv()
    assert config is not None
    return config


def composed(name: str) -> Config:
    return compose(f"experiment={name}")


def chain(name: str) -> list[dict]:
    """An experiment's file and those it builds on, the last word first."""
    content = yaml.safe_load((FILES / f"{name}.yaml").read_text())
    below = [each for each in content.pop("defaults") if isinstance(each, str)]
    return [content, *(part for each in below for part in chain(each))]


def leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def test_every_experiment_has_a_row_here_and_in_the_docs():
    """A new file is checked against its source and has its command and cost written down, or the suite fails."""
    assert set(EXPERIMENTS) == set(RECIPES)
    text = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text()
    papers = {name for name in EXPERIMENTS if not name.startswith("cifar10_")}
    assert set(re.findall(r"^\| `(\w+)` \|.* \d+ \|", text, re.MULTILINE)) == papers
    assert set(re.findall(r"^    \$TRAIN experiment=(\w+) ", text, re.MULTILINE)) == papers


@pytest.mark.parametrize("name", EXPERIMENTS, scope="module")  # by name, so that a worker composes it once
def test_recipe_is_what_its_sources_print(name):
    config, row = composed(name), RECIPES[name]
    run, train, schedule = row.run, config.train, config.optim.schedule
    assert train.global_batch_size in BATCHES[run.images]
    steps, warmup = total_steps(train, run.images), warmup_steps(schedule, train, run.images)
    assert (steps, warmup) == (run.steps, run.warmup)
    places = (0, warmup, steps // 2, steps - 1)
    lrs = [lr_at(step, steps, schedule, warmup, config.optim.lr) for step in places]
    assert lrs == pytest.approx(run.lrs, rel=2e-6, abs=1e-12)  # the table's seven digits; a cosine's end is not quite 0
    if run is SIMMIM_800:  # 700 x 1,281,167 / 2,048 = 437,899
        around = [lr_at(step, steps, schedule, warmup, config.optim.lr) for step in (437_898, 437_899)]
        assert around == pytest.approx([4e-4, 4e-5])
    assert (config.optim.weight_decay, config.optim.clip_grad_norm) == (run.weight_decay, run.clip)
    assert (config.optim.betas, config.optim.eps) == ([0.9, 0.999], 1e-8)

    model = config.model
    assert (model.name, model.img_size, model.window_size) == (row.size, row.img_size, row.window)
    assert tuple(window for window in model.pretrained_window_sizes if window) == row.pretrained
    assert model.drop_path_rate == row.drop_path

    with on_meta():
        module = build_task(config, torch.device("cpu")).module
    assert count_parameters(module) == row.parameters
    encoder = getattr(module, "encoder", module)
    blocks = [block for stage in encoder.layers for block in stage.blocks]
    assert blocks[-1].drop_path_rate == pytest.approx(row.drop_path)
    if row.pretrained:
        time = () if row.clip is None else (row.clip[2],)
        assert encoder.pretrained_window_sizes == tuple((*time, side, side) for side in row.pretrained)
    if row.clip is None:
        assert model.frames is None
    else:
        in_time = (model.frames, model.patch_frames, model.window_frames, config.data.frame_stride)
        assert in_time == row.clip and model.pretrained_window_frames == 0
    if row.head is not None and config.task.name == "classify":
        assert module.head_dropout == (0.0 if row.clip is None else 0.5)  # Video Swin's heads

    groups = build_param_groups(module, config.optim)
    decay, spared = (
        [group for group in groups if group["name"].endswith("no_decay") is without] for without in (False, True)
    )
    assert {group["weight_decay"] for group in decay} == {run.weight_decay}
    assert {group["weight_decay"] for group in spared} == {0.0}
    assert tuple(sum(len(group["params"]) for group in kind) for kind in (decay, spared)) == row.tensors
    assert config.optim.layer_decay == row.layer_decay
    assert len(groups) == (2 * row.layers if row.layers else 2 if row.encoder_lr == 1 else 4)
    least = row.encoder_lr * row.layer_decay ** max(0, row.layers - 1)
    assert min(group["lr_scale"] for group in groups) == pytest.approx(least)


@pytest.mark.parametrize("name", EXPERIMENTS, scope="module")  # by name, so that a worker composes it once
def test_recipe_sees_its_images_as_its_sources_do(name):
    config, row = composed(name), RECIPES[name]
    task, data = config.task, config.data
    ranks = 1 if row.size == "demo" else 8
    assert config.train.global_batch_size % (config.train.micro_batch_size * ranks) == 0
    assert (data.hflip, data.crop_ratio) == (0.5, pytest.approx([3 / 4, 4 / 3]))
    photographs = row.head is None and row.run.images not in (CIFAR10, SATVISION)
    assert data.interpolation == ("bilinear" if photographs or row.clip else "bicubic")
    if row.run.images == CIFAR10:
        assert data.eval_crop_pct == 1.0
    elif row.run.images == SATVISION:
        assert (data.mean, data.std, data.image_member) == ([0] * 14, [1] * 14, "input.npy")
        scaled = [
            [
                factor * value + offset
                for value, factor, offset in zip(ends, data.scale.factor, data.scale.offset, strict=True)
            ]
            for ends in (SATVISION_LOW, SATVISION_HIGH)
        ]
        assert scaled[0] == pytest.approx([0] * 14, abs=1e-6) and scaled[1] == pytest.approx([1] * 14, abs=1e-6)
    else:
        assert (data.mean, data.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        assert (data.eval_crop, data.eval_crop_pct) == (("squash", 1.0) if name in WHOLE_IMAGE else ("centre", 0.875))
    if row.head is None:
        assert isinstance(task, SimMIMConfig)
        assert (task.mask_ratio, task.norm_target) == (0.6, row.norm_target)
        assert task.mask_unit_px == (8 if row.size == "demo" or row.run.images == SATVISION else 32)
        assert data.crop_scale == [0.67, 1.0]
        return
    if row.run.images == ADE20K:
        assert isinstance(task, SegmentConfig)
        assert (task.num_classes, task.reduce_zero_label, task.ignore_index) == (150, True, 255)
        assert (task.resize_long_px, task.resize_short_px, task.resize_scale) == (
            4 * config.model.img_size, row.img_size, [0.5, 2.0]
        )  # fmt: skip
        assert (task.crop_max_category_share, task.photometric, task.resize) == (0.75, True, "opencv")
        heads = (task.head_norm, task.head_channels, task.aux_channels, task.aux_weight, task.dropout)
        assert heads == ("sync_batch", 512, 256, 0.4, 0.1)
        assert (task.loss_denominator, task.class_weights, task.eval_mode) == ("all", None, "whole")
        return
    if row.run.images in (COCO, OBJECTS365):
        check_detector(name, task)
        return
    assert isinstance(task, ClassifyConfig)
    assert (task.num_classes, task.label_smoothing) == (row.head, 0.0 if row.clip else 0.1)
    assert (task.color_jitter, task.mixup_prob, task.mixup_switch_prob) == (0.0, 1.0, 0.5)
    augment = (task.rand_augment, task.erasing_prob, task.mixup_alpha, task.cutmix_alpha)
    assert augment == AUGMENT[row.augment]
    assert data.crop_scale == ([0.6, 1.0] if row.size == "demo" else [0.08, 1.0])


def check_detector(name: str, task: TaskConfig) -> None:
    assert isinstance(task, DetectConfig)
    htc, mask_rcnn, boxes = "_htc_" in name, "mask_rcnn" in name, name.startswith("objects365")
    assert (task.head, task.num_classes) == ("mask_rcnn" if mask_rcnn else "cascade_mask_rcnn", RECIPES[name].head)
    assert (task.masks, task.interleaved, task.mask_flow) == (not boxes, htc and not boxes, htc and not boxes)
    assert (task.class_agnostic, task.box_loss) == ((True, "smooth_l1") if htc else (False, None))
    assert (task.level_proposals, task.proposals, task.eval_proposals) == (2000, 1000 if mask_rcnn else 2000, 1000)
    assert (task.box_samples, task.mask_samples, task.detections, task.max_objects) == (512, 128, 100, 100)
    assert (task.score_threshold, task.nms_iou, task.soft_nms) == (
        (0.001, 0.5, "linear") if htc else (0.05, 0.5, "none")
    )
    assert task.resize_scale == ([0.8, 1.25] if name.endswith("1x") else [0.1, 2.0])
    assert (task.eval_long_px, task.eval_short_px) == ((1833, 1100) if htc else (1333, 800))
    assert (task.head_channels, task.head_width, task.head_norm) == (256, 1024, "layer")


@pytest.mark.parametrize("name", EXPERIMENTS, scope="module")  # by name, so that a worker composes it once
def test_fine_tuning_starts_from_the_run_that_comes_before_it(name):
    """Nothing fine-tunes from nothing, and the position bias is told the windows at which it was trained."""
    config, row = composed(name), RECIPES[name]
    if row.after is None:
        assert config.task.init_from is None and not config.task.init_required
        return
    assert config.task.init_required or row.size == "demo"  # the demo and the proof train from scratch by it, too
    first = RECIPES[row.after]
    assert config.task.init_from == chain(row.after)[0]["run_dir"]
    assert first.size == row.size
    if first.pretrained:  # whoever starts from it goes on with the same position bias
        assert row.pretrained == first.pretrained
        return
    assert isinstance(first.img_size, int)
    sides = tuple(min(first.window, first.img_size // 4 // 2**i) for i in range(4))
    assert row.pretrained == (() if row.window == first.window else sides)


@pytest.mark.parametrize("name", EXPERIMENTS, scope="module")  # by name, so that a worker composes it once
def test_experiment_changes_what_its_files_name_and_nothing_else(name):
    """Its values are those of its files, and what they leave out is the defaults' of its groups: nothing leaks in."""
    config = composed(name)
    demo, simmim = RECIPES[name].size == "demo", RECIPES[name].head is None
    data = "cifar10" if demo else "folder" if simmim else "labelled"
    plain = compose(
        f"model={config.model.name}", f"task={config.task.name}", f"data={data}",
        f"engine=zero{config.engine.zero_stage}", *(["task.mask_unit_px=8"] if demo and simmim else []),
    )  # fmt: skip
    files: dict[str, object] = {}
    for part in reversed(chain(name)):
        files |= leaves(part)
    given = {"run_dir": "r", "data.shards": "x.tar"}
    ours, theirs = (leaves(OmegaConf.to_container(OmegaConf.structured(each))) for each in (config, plain))
    assert ours == theirs | files | given
