"""Images per second and core of the fine-tuning recipe's augmentation, beside timm's own pieces, in one run.

    OMP_NUM_THREADS=1 python benchmarks/augment_throughput.py [--rounds 15] [--images 40] [--size 256]

Everything works on the same decoded images of 500 x 375 pixels, in one process with one thread; the steps take turns,
and what counts is CPU time, which other programs on the machine disturb less, as the median over the rounds of the
ratio in the same round.  timm's create_transform itself wants torchvision: "timm's pieces" are its RandAugment and its
RandomErasing around the crop, resize, flip and normalisation that it would ask torchvision and Pillow for.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from loader_throughput import photograph
from PIL import Image

from swinv2_train.config.command_line import compose_overrides
from swinv2_train.data.loading.sample_rngs import sample_rngs
from swinv2_train.data.transforms.augment import Mixing, color_jitter, draw_erasing, erase, rand_augment
from swinv2_train.data.transforms.crop import random_box
from swinv2_train.data.transforms.decode import decode_image
from swinv2_train.tasks import build_task

POLICY, PICTURES, BATCH = "rand-m9-mstd0.5-inc1", 16, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def timms(name: str) -> ModuleType:
    folder = importlib.util.find_spec("timm").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(name, f"{folder}/data/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps(size: int) -> dict[str, tuple[str, Callable[[int], object]]]:
    """By name: the step that it is compared with, and what it does with image number n."""
    common = ["run_dir=x", "data=labelled", "data.shards=x", "task=classify", "model=demo", f"model.img_size={size}",
              "model.window_size=8", "train.micro_batch_size=2"]  # fmt: skip
    off = ["task.rand_augment=null", "task.erasing_prob=0", "task.mixup_alpha=0", "task.cutmix_alpha=0"]
    full, plain = (
        build_task(compose_overrides([*common, *extra]), torch.device("cpu")).train_transform for extra in ([], off)
    )
    decoded = [decode_image(photograph(number), "jpg") for number in range(PICTURES)]
    pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in decoded]
    crops = [
        plain(image, {"label": 0}, sample_rngs(0, [(0, number)])[0])["images"] for number, image in enumerate(decoded)
    ]
    cropped = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in crops]
    settings = {"translate_const": int(0.45 * size), "img_mean": (124, 116, 104), "interpolation": Image.BICUBIC}
    policy = timms("auto_augment").rand_augment_transform(POLICY, settings)
    erasing = timms("random_erasing").RandomErasing(0.25, mode="pixel", device="cpu")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    box_rng = np.random.default_rng(0)

    def timms_pieces(number: int) -> torch.Tensor:
        picture = pictures[number % PICTURES]
        top, left, height, width = random_box(picture.height, picture.width, (0.08, 1.0), (3 / 4, 4 / 3), box_rng)
        picture = picture.crop((left, top, left + width, top + height)).resize((size, size), Image.BICUBIC)
        if random.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(policy(picture))).permute(2, 0, 1).contiguous().float().div_(255)
        return erasing(pixels.sub_(mean).div_(std))

    def rng_of(number: int) -> np.random.Generator:
        return sample_rngs(0, [(1, number)])[0]

    def on_the_device(number: int) -> None:
        if number % BATCH == 0:  # once for BATCH images
            boxes = [draw_erasing(size, size, 0.25, rng_of(number + other)) for other in range(BATCH)]
            batch = torch.stack([crops[other % PICTURES] for other in range(BATCH)]).float()
            erase(batch, boxes)
            Mixing(0.8, 1.0, 1.0, 0.5)(batch, number)

    bare, whole = "RandAugment, timm's alone on a Pillow image", "timm's pieces: Pillow crop to normalised tensor"
    return {
        bare: (bare, lambda number: policy(cropped[number % PICTURES])),
        "RandAugment, ours (from and to a tensor, seeded)": (
            bare, lambda number: rand_augment(crops[number % PICTURES], POLICY, MEAN, "bicubic", rng_of(number)),
        ),
        "colour jitter 0.4, ours": (bare, lambda number: color_jitter(crops[number % PICTURES], 0.4, rng_of(number))),
        whole: (whole, timms_pieces),
        "ours in a worker: crop to uint8, box and seed": (
            whole, lambda number: full(decoded[number % PICTURES], {"label": 0}, rng_of(number)),
        ),
        "ours without augmentation: crop and flip": (
            whole, lambda number: plain(decoded[number % PICTURES], {"label": 0}, rng_of(number)),
        ),
        f"ours on the device (here the CPU), batches of {BATCH}": (whole, on_the_device),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, default=48, help="per step and round")
    parser.add_argument("--size", type=int, default=256, help="side of the crop in pixels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    compared, seconds = steps(options.size), {}
    for turn in range(-1, options.rounds):  # the first warms up
        for name, (_, step) in compared.items():
            random.seed(turn + 1)
            np.random.seed(turn + 1)
            started = time.process_time()
            for number in range(turn * options.images, (turn + 1) * options.images):
                step(abs(number))
            if turn >= 0:
                seconds.setdefault(name, []).append((time.process_time() - started) / options.images)
    print("| step | images per CPU second (median) | CPU time to that of the step beside it | beside |")
    print("|---|---|---|---|")
    for name, (base, _) in compared.items():
        ratio = statistics.median(mine / its for mine, its in zip(seconds[name], seconds[base], strict=True))
        beside = "-" if base == name else base.split(":")[0].split(",")[0]
        print(f"| {name} | {1 / statistics.median(seconds[name]):.0f} | {ratio:.2f} | {beside} |")


if __name__ == "__main__":
    main()
