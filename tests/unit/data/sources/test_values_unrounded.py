"""What a file's number is worth at the model: the same to float32's rounding, from whatever source and file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from swinv2_train.config import Config
from swinv2_train.config.schema import MixSourceConfig
from swinv2_train.data.loading.pipe_loader import build_train_loader
from swinv2_train.data.packing import pack, read_source
from swinv2_train.data.sources.base import open_source
from swinv2_train.data.sources.pipe import open_stream
from swinv2_train.tasks import build_task
from swinv2_train.tasks.task import Task
from swinv2_train.training.build import _open_training
from tests.support.configs import composed
from tests.support.images import npy, npz, tiff
from tests.support.shard_files import write_plain_tar

COUNT, BANDS, SIDE = 3, 4, 8
FACTOR, OFFSET, CLIP = [0.01, 1 / 16320, -2.0, 1.0], [0.0, -0.25, 3.0, 100.0], [-300.0, 300.0]
MEAN, STD = [0.5, -0.1, 7.0, 3.0], [0.3, 0.2, 90.0, 11.0]
VALUES = (
    "task=simmim", "model=demo", f"model.in_chans={BANDS}", f"model.img_size={SIDE}", "model.window_size=2",
    "task.mask_unit_px=8", f"data.scale.factor={FACTOR}", f"data.scale.offset={OFFSET}", f"data.scale.clip={CLIP}",
    f"data.mean={MEAN}", f"data.std={STD}", "data.crop_scale=[1,1]", "data.crop_ratio=[1,1]", "data.hflip=0",
    "data.num_workers=0", "data.shuffle_buffer_images=3", "run_dir=r",
)  # fmt: skip


def array(number: int, dtype: str) -> np.ndarray:
    """(8, 8, 4) over the whole range of the type; of floats, with numbers of many digits."""
    rng, kind = np.random.default_rng(number), np.dtype(dtype)
    if kind.kind == "f":
        return (rng.normal(0, 1, (SIDE, SIDE, BANDS)) * 10.0 ** rng.integers(-3, 4, BANDS)).astype(kind)
    info = np.iinfo(kind)
    found = rng.integers(info.min, info.max + 1, (SIDE, SIDE, BANDS)).astype(kind)
    found[0, 0], found[0, 1] = info.min, info.max
    return found


def png(image: np.ndarray) -> bytes:
    import imagecodecs

    return imagecodecs.png_encode(image)


FILES = {
    "npy": npy,
    "npz": lambda image: npz(True, x=image),
    "tif": tiff,
    "png": png,
}


def saved(path: Path, column: list, kind, **options) -> str:
    from datasets import Dataset, Features

    Dataset.from_dict({"image": column}, features=Features({"image": kind})).save_to_disk(str(path), **options)
    return str(path)


@pytest.fixture(scope="module")
def plain() -> Config:
    return composed([*VALUES, "data.shards=x"])


@pytest.fixture(scope="module")
def task(plain) -> Task:
    return build_task(plain, torch.device("cpu"))


def fed(task, config, source, number: int) -> torch.Tensor:
    """The model's own input for the image of that number, by the task's transform and normalisation."""
    steps = {"seed": 1, "global_batch_size": 6, "micro_batch_size": 6, "rank": 0, "world_size": 1, "start_images": 0}
    loader = build_train_loader(source, config.data, task.train_transform, **steps)
    batch = next(iter(loader))
    loader.close()
    assert batch["images"].dtype == torch.float32
    inputs: list[torch.Tensor] = []

    def forward(images: torch.Tensor, **others: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs.append(images)
        return {"loss": images.sum(), "image_losses": images, "image_counts": images}

    task.loss(forward, batch)
    keys = [key.rpartition("/")[2].partition(".")[0].removeprefix("k") for key in batch["keys"]]
    return inputs[0][keys.index(str(number))]


def assert_exact(found: torch.Tensor, image: np.ndarray) -> None:
    """Of every number, (value x factor + offset, clipped, - mean) / std, to the rounding of float32 in each term."""
    value, factor, offset, mean, std = (np.asarray(each, np.float64) for each in (image, FACTOR, OFFSET, MEAN, STD))
    expected = ((value * factor + offset).clip(*CLIP) - mean) / std
    largest = np.maximum(np.abs(value * factor).clip(0, 600), np.abs(offset)) + np.abs(mean) + np.abs(expected * std)
    error = np.abs(found.permute(1, 2, 0).double().numpy() - expected)
    assert (error <= 4 * np.finfo(np.float32).eps * largest / std).all(), (error * std / largest).max()
    assert len(np.unique(expected)) > 0.9 * min(256, expected.size / 4)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *[("npy", dtype) for dtype in ("uint8", "uint16", "int16", "float16", "float32")],
        *[("tif", dtype) for dtype in ("uint16", "int16", "float32")], ("npz", "float32"), ("png", "uint16"),
    ],
)  # fmt: skip
def test_a_number_reaches_the_model_unrounded_from_every_source(kind, dtype, plain, task, tmp_path):
    images = {number: array(number, dtype) for number in range(COUNT)}
    files = {f"k{number}": FILES[kind](image) for number, image in images.items()}
    folder = tmp_path / "folder"
    folder.mkdir()
    for key, content in files.items():
        (folder / f"{key}.{kind}").write_bytes(content)
    tar = write_plain_tar(tmp_path / "t.tar", [(f"{key}.{kind}", content) for key, content in files.items()])
    member = write_plain_tar(tmp_path / "m.tar", [(f"{key}.input.{kind}", content) for key, content in files.items()])
    pack(read_source(folder)[0], str(tmp_path / "packed" / "p"), samples_per_shard=2, seed=0)
    packed = open_source(f"{tmp_path}/packed/p-*.tar")
    reader = packed.open_reader()
    places = [(shard, index) for shard, count in enumerate(packed.counts) for index in range(count)]
    assert {reader.key(*place): reader.read(*place).image for place in places} == files  # byte for byte
    parts = {"a": MixSourceConfig(str(tar), 1.0), "b": MixSourceConfig(str(folder), 1.0)}
    mix = replace(plain, data=replace(plain.data, shards="", mix=parts))
    data = replace(plain.data, image_member=f"input.{kind}", num_workers=int(dtype == "float32"))
    named = replace(plain, data=data)
    from datasets import Array3D, Image

    cells = [{"bytes": content, "path": f"{key}.{kind}"} for key, content in files.items()]
    column = saved(tmp_path / "files", cells, Image())
    sources = [
        (plain, open_source(str(folder))),
        (plain, packed),
        (plain, open_stream(f"pipe:cat {tar}")),
        (plain, open_source(column)),
        (named, open_source(str(member), image_member=f"input.{kind}")),
        (mix, _open_training(mix, None, lambda line: None)),
    ]
    if kind == "npy":
        arrays = saved(tmp_path / "arrays", list(images.values()), Array3D((SIDE, SIDE, BANDS), dtype))
        sources.append((plain, open_source(arrays)))
    for config, source in sources:
        assert_exact(fed(task, config, source, 0), images[0])
