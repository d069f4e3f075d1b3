"""The statistics of bands equal numpy's in float64, for every kind of file, and say what is wrong with a band."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from swinv2_train import stats
from swinv2_train.config import ConfigError
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.statistics.numbers import at_place, exact, places, quotient
from swinv2_train.data.statistics.summary import PERCENTILES
from swinv2_train.data.transforms.decode import decode_image
from swinv2_train.distributed import World
from tests.support.clips import frames_file
from tests.support.configs import composed

ALONE = World(0, 0, 1, 1, torch.device("cpu"))
RTOL = 1e-13  # measured worst 4e-15: numpy's own sums are rounded, too


def arrays(dtype: str, bands: int, count: int = 5, seed: int = 0) -> list[np.ndarray]:
    """Images of several sizes, (H, W, bands)."""
    rng = np.random.default_rng(seed)
    shapes = [(9 + i % 3, 11, bands) for i in range(count)]
    if np.dtype(dtype).kind == "f":
        return [(rng.normal(50 * np.arange(bands), 5, shape)).astype(dtype) for shape in shapes]
    info = np.iinfo(dtype)
    return [rng.integers(info.min, info.max + 1, shape).astype(dtype) for shape in shapes]


def write_npy(folder: Path, images: list[np.ndarray]) -> str:
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        np.save(folder / f"i{number:03}.npy", image)
    return f"data.shards={folder}"


def measured(*arguments: str) -> stats.Measured:
    """What the command measures of data.shards, without a process group."""
    config, request = stats.parse(["data.num_workers=0", "log.progress=none", *arguments])
    sources, _ = stats.open_sources(config)
    assert not request.count_bands or config.model.in_chans == 3
    if request.count_bands:
        config = stats.with_bands_of(config, sources[""])
    return stats.measured(config, "", sources[""], stats.band_names(config), ALONE)


def assert_equal(found: stats.Measured, pixels: np.ndarray) -> None:
    """pixels: (all pixels, bands), NaN where nothing was measured."""
    for band, column in zip(found.bands, pixels.astype(np.float64).T, strict=True):
        known = column[~np.isnan(column)]
        np.testing.assert_allclose(
            [band.mean, band.std, *band.percentiles],
            [known.mean(), known.std(), *np.percentile(known, PERCENTILES)], rtol=RTOL,
        )  # fmt: skip
        assert (band.low, band.high, band.nodata) == (known.min(), known.max(), np.isnan(column).sum() / len(column))
        assert 0.9 * len(known) <= sum(band.bars) <= len(known)


def flat(images: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([image.reshape(-1, image.shape[2]) for image in images])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float16", "float32"])
def test_equal_to_numpy_for_every_element_type(dtype, tmp_path, capsys):
    """The number of bands is the first image's, which is said."""
    images = arrays(dtype, 4)
    found = measured(write_npy(tmp_path / "npy", images))
    assert_equal(found, flat(images))
    assert "model.in_chans=4" in capsys.readouterr().out


def test_twelve_bands_with_no_data_scale_and_clip(tmp_path):
    """Values are scaled in float32 as on the device; what was not measured counts nowhere."""
    images = arrays("float32", 12)
    for image in images:
        image[:4, :4] = np.nan
        image[5, 5, 3] = -9999
    factor, offset = [0.01 * (1 + band) for band in range(12)], 0.25
    found = measured(
        write_npy(tmp_path / "npy", images), "data.nodata=[nan,-9999]", f"data.scale.factor={factor}",
        f"data.scale.offset={offset}", "data.scale.clip=[0.3,60]",
    )  # fmt: skip
    pixels = flat(images)
    pixels[pixels == -9999] = np.nan
    assert_equal(found, np.clip(pixels * np.float32(factor) + np.float32(offset), np.float32(0.3), np.float32(60)))


def test_images_of_whole_numbers_among_others(tmp_path):
    """Both ways of counting meet in one sum; negative numbers and a negative factor keep their order."""
    images = [np.rint(image) if number % 2 else image for number, image in enumerate(arrays("float32", 2))]
    images[1] -= 100
    found = measured(write_npy(tmp_path / "npy", images), "data.scale.factor=-0.5")
    assert_equal(found, flat(images) * np.float32(-0.5))


def test_sixteen_bit_tiffs_by_chosen_bands(tmp_path):
    images = arrays("uint16", 5)
    (tmp_path / "tif").mkdir()
    for number, image in enumerate(images):
        tifffile.imwrite(tmp_path / "tif" / f"{number}.tif", image, photometric="minisblack", planarconfig="contig")
    found = measured(f"data.shards={tmp_path}/tif", "data.bands=[3,1]", "data.nodata=[7]")
    pixels = flat(images)[:, [3, 1]].astype(np.float64)
    pixels[pixels == 7] = np.nan
    assert_equal(found, pixels)


def test_photographs_are_red_green_and_blue_in_0_to_1(tmp_path):
    (tmp_path / "jpg").mkdir()
    pixels = []
    for number in range(3):
        path = tmp_path / "jpg" / f"{number}.jpg"
        Image.fromarray(arrays("uint8", 3, 1, number)[0]).resize((20, 30)).save(path)
        pixels.append(decode_image(path.read_bytes(), "jpg").permute(1, 2, 0).numpy())
    assert_equal(measured(f"data.shards={tmp_path}/jpg"), flat(pixels) / 255)


def test_a_pipe_is_read_from_front_to_back_for_each_look(tmp_path):
    images = arrays("float32", 2, 6)
    folder = write_npy(tmp_path / "npy", images).partition("=")[2]
    paths = sorted(Path(folder).glob("*.npy"))
    write_shards(((path.stem, path.read_bytes(), "npy", None) for path in paths), f"{tmp_path}/t", 3)
    found = measured(f"data.shards='pipe:cat {tmp_path}/t-{{000000..000001}}.tar'", "model.in_chans=2")
    assert_equal(found, flat(images))


def test_damaged_samples_are_left_out_and_counted(tmp_path, caplog):
    """As the policy says, and never as the stand-in that training would take."""
    images = arrays("uint16", 2)
    where = write_npy(tmp_path / "npy", images)
    (tmp_path / "npy" / "i002.npy").write_bytes(b"\x93NUMPY and no more")
    with pytest.raises(ConfigError, match="'i002': .*data.on_bad_sample=replace to go on"):
        measured(where)
    with pytest.raises(ConfigError, match="max_bad_fraction .* is exceeded: 1 damaged"):
        measured(where, "data.on_bad_sample=replace")
    found = measured(where, "data.on_bad_sample=replace", "data.max_bad_fraction=0.5")
    assert (found.images, found.left_out) == (4, 1)
    assert_equal(found, flat(images[:2] + images[3:]))
    assert "damaged sample left out" in caplog.text and "i002" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        ("nodata", ("data.nodata=[nan]",), "band B2 holds no data at all"),
        ("constant", (), "band B2 is 3 everywhere, so its std is 0"),
        ("nan", (), "are not finite; name them by data.nodata"),
        ("scale", ("data.scale.factor=1e38",), "takes band 0 beyond float32"),
        ("clip", ("data.scale.clip=[1000,2000]",), "band B1 is 1000 everywhere"),
    ],
)
def test_a_band_without_statistics_is_named(spoil, arguments, message, tmp_path):
    images = arrays("float32", 2)
    for image in images:
        if spoil in ("nodata", "nan"):
            image[..., 1] = np.nan
        elif spoil == "constant":
            image[..., 1] = 3
    where = write_npy(tmp_path / "npy", images)
    (tmp_path / "npy" / "bands.json").write_text('["B1", "B2"]')
    with pytest.raises(ConfigError, match=message):
        stats.check_varied(measured(where, "data.bands=[B1,B2]", *arguments).bands, "data.shards", ["B1", "B2"])


def test_a_mixture_has_each_source_by_its_weight(tmp_path):
    """However many images and pixels a source has: so training draws them."""
    parts = {name: arrays("float32", 2, count, count) for name, count in (("a", 2), ("b", 7))}
    parts["b"] = [image * 3 for image in parts["b"]]
    found = []
    for name, images in parts.items():
        found.append(measured(write_npy(tmp_path / name, images)).bands)
    mixed = stats.mixed(found, (3, 1))
    for number, band in enumerate(mixed):
        pair = [flat(images)[:, number].astype(np.float64) for images in parts.values()]
        mean = (3 * pair[0].mean() + pair[1].mean()) / 4
        square = (3 * ((pair[0] - mean) ** 2).mean() + ((pair[1] - mean) ** 2).mean()) / 4
        np.testing.assert_allclose([band.mean, band.std], [mean, np.sqrt(square)], rtol=RTOL)


def test_images_that_change_between_two_looks_are_noticed(tmp_path, monkeypatch):
    """A share of one look and sums of another would be numbers of nothing."""
    images = arrays("float32", 2)
    where = write_npy(tmp_path / "npy", images)
    looks = stats.wanted_of

    def meanwhile(first, scale):
        images[0][0, 0, 1] = np.nan
        write_npy(tmp_path / "npy", images)
        return looks(first, scale)

    monkeypatch.setattr(stats, "wanted_of", meanwhile)
    with pytest.raises(ConfigError, match="were others when they were read again"):
        measured(where, "data.nodata=[nan]", "model.in_chans=2")


def test_numbers_add_up_in_any_order_and_places_are_those_of_the_values():
    values = np.array([1e-320, 1e300, -1e300, 0.1, -3.5, 2**-1074])
    assert quotient(sum(map(exact, values.tolist())), 1) == quotient(sum(map(exact, values[::-1].tolist())), 1) == -3.4
    floats = np.array([-np.float32(3e38), -1, -1e-40, -0.0, 0.0, 1e-40, 1, 3e38], np.float32)
    found = places(floats)
    assert (np.diff(found.astype(np.int64)) >= 0).all() and found[3] == found[4]
    assert [at_place(int(each)) for each in found] == floats.tolist()


# --------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bands.yaml", "my bands.yml"])
def test_the_file_is_a_group_for_every_command(name, tmp_path, monkeypatch):
    """From any directory, under the options of an experiment; the command line comes after it."""
    images = arrays("float32", 4)
    where = write_npy(tmp_path / "npy", images)
    monkeypatch.chdir(tmp_path)
    arguments = ["data.shards=npy", "model.in_chans=4", "data.nodata=[nan,-1e-05]", "data.scale.clip=[-10,1e6]"]
    config, request = stats.parse([*arguments, f"out='{tmp_path / name}'", f"json={tmp_path / 'all.json'}"])
    found = measured(where, *arguments[1:])
    stats.write(config, request, [found], found.bands, stats.band_names(config))
    monkeypatch.chdir("/")
    again = composed(["experiment=in1k_tiny_256_w8", f"data='{tmp_path / name}'", "model.in_chans=4", "run_dir=r",
                      "task.rand_augment=null", "task.color_jitter=0", "data.hflip=0.25"])  # fmt: skip
    assert again.data.mean == [band.mean for band in found.bands] and again.data.std == [b.std for b in found.bands]
    assert again.data.shards == f"{tmp_path}/npy" and again.data.scale.clip == [-10, 1e6]
    assert np.isnan(again.data.nodata[0]) and again.data.nodata[1] == -1e-05
    assert again.data.hflip == 0.25
    plain = composed(["experiment=in1k_tiny_256_w8", "run_dir=r", "data.shards=x"])
    assert again.data.crop_scale == plain.data.crop_scale == [0.08, 1.0]
    assert Image.open((tmp_path / name).with_suffix(".png")).size[0] > 500
    numbers = json.loads((tmp_path / "all.json").read_text())["data.shards"]["bands"]["3"]
    assert numbers["mean"] == found.bands[3].mean and numbers["percentiles"]["98"] == found.bands[3].percentiles[5]


def test_secrets_of_an_address_are_not_written(tmp_path):
    config, _ = stats.parse(["data.shards='https://host/t-{0..3}.tar?signature=abc'", "model.in_chans=2"])
    band = measured(write_npy(tmp_path / "npy", arrays("uint8", 2))).bands
    text = stats.group_text(config, band, ["table"])
    assert "abc" not in text and "shards:" not in text and "the address has secrets" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.shards=x", "out=stats.json"], "must end in .yaml"),
        ([], "data.shards has no value"),
        (["data.shards=x", "model.in_chans=0"], "model.in_chans"),
        (["data.shards=x", "data.bands=[0,1]", "model.in_chans=3"], "set model.in_chans=2"),
        (["data=nowhere.yaml"], "data=nowhere.yaml: there is no such file; name another, or one of cifar10, folder"),
    ],
)
def test_wrong_input_is_told_before_an_image_is_read(arguments, message):
    with pytest.raises(ConfigError, match=message):
        stats.parse(arguments)


def test_clips_are_refused_with_their_number(tmp_path):
    """Their frames would be counted as nothing that anybody asked for."""
    write_shards([(f"c{n}", frames_file(2), "frames", 0) for n in range(3)], str(tmp_path / "t"), 3)
    config = composed([f"data.shards={tmp_path}/t-*.tar", "run_dir=x"])
    with pytest.raises(ConfigError, match="data.shards: 3 of 3 samples are clips, of which no statistics are made"):
        stats.open_sources(config)
