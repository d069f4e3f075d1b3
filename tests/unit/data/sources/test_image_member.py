"""Arrays from every kind of source: KEY.input.npy by data.image_member, .npy by its ending, names by bands.json."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from swinv2_train.config import DataConfig
from swinv2_train.data.loading.loader import TrainLoader
from swinv2_train.data.loading.pipe_loader import build_train_loader
from swinv2_train.data.packing import pack, read_source
from swinv2_train.data.sample import SampleError, ShardError
from swinv2_train.data.shards.shard_cache import ShardCache
from swinv2_train.data.shards.transfers import RetryPolicy
from swinv2_train.data.sources.base import open_source
from swinv2_train.data.sources.pipe import open_stream
from swinv2_train.data.transforms.bands import Bands
from swinv2_train.tasks.inputs import ImageTransform
from tests.support.images import image_bytes
from tests.support.loaders import CONFIG
from tests.support.shard_files import write_plain_tar
from tests.support.shard_server import serve

MEMBER = "input.npy"
COUNT, BANDS = 8, 4
SIZE = (8, 8)
DATA = replace(CONFIG, crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], hflip=0.0)


def array(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(300, 40, (*SIZE, BANDS)).astype(np.float32)


def npy(number: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array(number))
    return buffer.getvalue()


def members(photographs: bool = False) -> list[tuple[str, bytes]]:
    """As SatVision's shards have them, and beside each array something else that is an array, or a photograph."""
    found = []
    for number in range(COUNT):
        found += [(f"k{number}.input.npy", npy(number)), (f"k{number}.mask.npy", npy(100)), (f"k{number}.cls", b"1")]
        if photographs:
            found.append((f"k{number}.png", image_bytes(number)))
    return found


def loader_of(source, data: DataConfig, bands: Bands | None, **changes) -> TrainLoader:
    options = {"seed": 5, "global_batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1, "start_images": 0}
    return build_train_loader(source, data, ImageTransform(data, SIZE, True, bands=bands), **(options | changes))


def an_epoch(source, data: DataConfig = DATA, bands: Bands | None = None, **changes) -> dict[str, torch.Tensor]:
    """By key, in the order of one epoch."""
    loader = loader_of(source, data, bands or Bands(BANDS, None, "hwc", (), 1.0), **changes)
    found: dict[str, torch.Tensor] = {}
    for batch in loader:
        found |= {key: image.clone() for key, image in zip(batch["keys"], batch["images"], strict=True)}
        if len(found) == COUNT:
            loader.close()
            return found
    raise AssertionError("the stream has no end")


def assert_all(found: dict[str, torch.Tensor], key: str = "k{}") -> None:
    for number in range(COUNT):
        np.testing.assert_array_equal(found[key.format(number)].permute(1, 2, 0).numpy(), array(number))


@pytest.mark.parametrize("workers", [0, 2])
def test_members_with_several_dots_are_read_from_a_tar(tmp_path, workers):
    """webdataset cuts keys at the first dot; a row is the stored array bit for bit, in shared memory too."""
    path = write_plain_tar(tmp_path / "t-000.tar", members())
    source = open_source(str(path), image_member=MEMBER)
    assert source.num_samples == COUNT and source.label_range == (1, 1)
    assert_all(an_epoch(source, replace(DATA, num_workers=workers, image_member=MEMBER)))
    with pytest.raises(ShardError, match=r"no image in it \(members end in: cls, input.npy, mask.npy\)"):
        open_source(str(path))
    with pytest.raises(ShardError, match="no image in it .* wanted other.npy"):
        open_source(str(path), image_member="other.npy")


def test_the_same_tar_serves_photographs_and_arrays_at_once(tmp_path):
    """Each choice has its own index, so that neither reads the other's bytes."""
    path = write_plain_tar(tmp_path / "t-000.tar", members(photographs=True))
    arrays, photographs = open_source(str(path), image_member=MEMBER), open_source(str(path))
    assert arrays.open_reader().read(0, 3).image == npy(3)
    assert photographs.open_reader().read(0, 3).image == image_bytes(3)
    assert arrays.digest == photographs.digest
    assert sorted(each.name for each in tmp_path.glob("*.npy")) == ["t-000.tar.idx.npy", "t-000.tar.input.npy.idx.npy"]
    verified = open_source(str(path), image_member=MEMBER, verify=True)
    assert verified.open_reader().read(0, 3).image == npy(3)


def test_members_are_found_in_pipes_and_at_addresses(tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    path = write_plain_tar(served / "t-000.tar", members(photographs=True))
    data = replace(DATA, image_member=MEMBER, shuffle_buffer_images=3)
    assert_all(an_epoch(open_stream(f"pipe:cat {path}"), data))
    with serve(served) as server:
        patience = RetryPolicy(5.0, 20.0)
        for member, expected in ((MEMBER, npy(2)), (None, image_bytes(2)), (MEMBER, npy(2))):
            cache = ShardCache(str(tmp_path / "cache"), 2**30, patience, member)
            source = open_source(f"{server.url}/t-000.tar", cache=cache, image_member=member)
            reader = source.open_reader()
            assert reader.read(0, 2).image == expected
            reader.close()


def test_a_folder_of_arrays_is_one_of_images(tmp_path):
    """Where there are photographs too, arrays are something about them, unless they are asked for."""
    folder = tmp_path / "a"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"k{number}.npy").write_bytes(npy(number))
    assert_all(an_epoch(open_source(str(folder))))
    pack(read_source(folder)[0], str(tmp_path / "packed" / "t"), samples_per_shard=3, seed=0)
    assert_all(an_epoch(open_source(f"{tmp_path}/packed/t-*.tar")))
    for number in range(COUNT):
        (folder / f"k{number}.png").write_bytes(image_bytes(number))
        (folder / f"k{number}.input.npy").write_bytes(npy(number))
    assert open_source(str(folder)).num_samples == COUNT
    source = open_source(str(folder), image_member=MEMBER)
    assert source.num_samples == COUNT
    assert_all(an_epoch(source, replace(DATA, image_member=MEMBER)), "k{}.input")


def test_names_of_bands_lie_beside_shards_and_folders(tmp_path):
    (tmp_path / "bands.json").write_text(json.dumps(["B02", "B03", "B04", "B08"]))
    write_plain_tar(tmp_path / "t-000.tar", members())
    source = open_source(f"{tmp_path}/t-000.tar", image_member=MEMBER)
    found = an_epoch(source, replace(DATA, image_member=MEMBER), Bands(2, ("B08", "B02"), "hwc", (), 1.0))
    np.testing.assert_array_equal(found["k5"].permute(1, 2, 0).numpy(), array(5)[..., [3, 0]])
    with pytest.raises(ShardError, match="there is no 'B8A' in .*bands.json, which has B02, B03, B04, B08"):
        loader_of(source, DATA, Bands(1, ("B8A",), "hwc", (), 1.0))
    for wrong, message in (('{"a": 1}', "make it a list of names"), ('["B02", "B02"]', "names a band twice")):
        (tmp_path / "bands.json").write_text(wrong)
        with pytest.raises(ShardError, match=message):
            loader_of(source, DATA, Bands(1, ("B02",), "hwc", (), 1.0))
    (tmp_path / "bands.json").unlink()
    with pytest.raises(SampleError, match="neither this file nor a bands.json beside it names bands"):
        an_epoch(source, replace(DATA, image_member=MEMBER), Bands(1, ("B02",), "hwc", (), 1.0))


def test_a_damaged_array_follows_the_policy(tmp_path):
    """One is cut off, one has too few bands, one is mostly no data: replaced with weight 0 and named, or an error."""
    good = {f"k{n}": npy(n) for n in range(COUNT)}
    few, empty = io.BytesIO(), io.BytesIO()
    np.save(few, array(0)[..., :3])
    np.save(empty, np.full((*SIZE, BANDS), np.nan, np.float32))
    bad = {"k1": npy(1)[:-40], "k4": few.getvalue(), "k6": empty.getvalue()}
    rows = [(f"{key}.input.npy", bad.get(key, content)) for key, content in good.items()]
    source = open_source(str(write_plain_tar(tmp_path / "t.tar", rows)), image_member=MEMBER)
    bands = Bands(BANDS, None, "hwc", (np.nan,), 0.9)
    data = replace(DATA, on_bad_sample="replace", max_bad_fraction=0.5)
    loader = loader_of(source, data, bands, global_batch_size=8, micro_batch_size=8)
    batch = next(iter(loader))
    weights = dict(zip(batch["keys"], batch["weight"].tolist(), strict=True))
    assert weights == {key: float(key not in bad) for key in good}
    causes = {problem["key"]: problem["cause"] for problem in batch["problems"]}
    assert "bytes of elements" in causes["k1"] and "3 bands of 8 x 8" in causes["k4"] and "no data" in causes["k6"]
    assert batch["images"].isfinite().all()
    with pytest.raises(SampleError, match="repair it, or set data.on_bad_sample=replace"):
        next(iter(loader_of(source, DATA, bands, global_batch_size=8, micro_batch_size=8)))


def test_saved_data_sets_have_columns_and_no_members(tmp_path):
    Path(tmp_path, "state.json").write_text("{}")
    with pytest.raises(
        ShardError, match=r"data.image_member \(input.npy\) .* saved data set.*set data.image_member=null"
    ):
        open_source(str(tmp_path), image_member=MEMBER)
