"""For the tests of the evaluate command: labelled shards, a classifier's weights, and what plain loops say of both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swinv2_train import evaluate
from swinv2_train.config.arguments import last_of_each
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.distributed import World
from swinv2_train.models import SwinTransformerV2
from swinv2_train.weights import save_weights
from tests.support.harness import run_distributed
from tests.support.images import encoded

CLASSES, SIZE = 4, 16
MODEL = (
    "model=demo", "model.embed_dim=8", "model.depths=[1,1]", "model.num_heads=[1,2]", f"model.img_size={SIZE}",
    "model.window_size=2", "runtime.num_threads=1", "train.micro_batch_size=4",
)  # fmt: skip
CLASSIFY = ("task=classify", f"task.num_classes={CLASSES}", "data=cifar10")
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]))


def make_images(count: int, seed: int, size: int = SIZE) -> np.ndarray:
    """uint8 (count, size, size, 3)"""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_images(
    folder: Path, name: str, images: np.ndarray, labels: list[int | None], key: str = "{:03d}", damaged: int = 0
) -> str:
    """Shards of 4 images each, keys key.format(1), ...; returns their pattern.  damaged: how many at the end."""

    def samples():
        for number, (image, label) in enumerate(zip(images, labels, strict=True), start=1):
            data = encoded(image)
            broken = number > len(images) - damaged
            yield key.format(number), data[: 60 if broken else None], "png", label

    write_shards(samples(), str(folder / name), 4)
    return f"{folder}/{name}-*.tar"


def make_model(classes: int = CLASSES) -> SwinTransformerV2:
    """A classifier of MODEL's sizes whose weights are all random: fresh ones make every block the identity."""
    torch.manual_seed(3)
    model = SwinTransformerV2(
        img_size=SIZE, num_classes=classes, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2,
        pretrained_window_sizes=(0, 0), drop_path_rate=0.0,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def save_model(path: Path, classes: int = CLASSES) -> str:
    save_weights(make_model(classes), path, "microsoft")
    return str(path)


@torch.no_grad()
def logits_of(images: np.ndarray, classes: int = CLASSES) -> torch.Tensor:
    """What make_model says of whole images, one at a time: (count, classes)."""
    model = make_model(classes)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return torch.cat([model(((image - MEAN) / STD)[None]) for image in pixels])


def expected_scores(logits: torch.Tensor, answers: list[list[int]]) -> dict[str, float]:
    """Top-1, top-5 and loss over the images with a right class, by plain loops in float64."""
    first, five, loss, count = 0, 0, 0.0, 0
    for row, right in zip(logits.double(), answers, strict=True):
        if not right:
            continue
        order = sorted(range(len(row)), key=lambda label: -row[label].item())
        first += order[0] in right
        five += bool(set(order[:5]) & set(right))
        loss -= float(torch.log(sum(row.softmax(0)[label] for label in set(right))))
        count += 1
    return {"images": count, "val/top1": 100 * first / count, "val/top5": 100 * five / count, "val/loss": loss / count}


def evaluate_command(capfd: Any, *arguments: str, ranks: int = 1) -> tuple[int, str, str]:
    """The command in ranks of its own: rank 0's exit code, and what all of them wrote to stdout and stderr."""

    def command(world: World) -> int:
        sys.argv = ["evaluate", *last_of_each(arguments)]
        try:
            evaluate.main()
        except SystemExit as left:
            return int(left.code or 0)
        raise AssertionError("the command always exits")

    capfd.readouterr()
    codes = run_distributed(command, ranks, init=False)
    out, err = capfd.readouterr()
    assert len(set(codes)) == 1, (codes, err)
    return codes[0], out, err


def evaluated(capfd: Any, *arguments: str, ranks: int = 1) -> dict[str, Any]:
    """The command's one line; it must have succeeded."""
    code, out, err = evaluate_command(capfd, *arguments, ranks=ranks)
    assert code == 0, err
    assert out.count("\n") == 1, out
    return json.loads(out)
