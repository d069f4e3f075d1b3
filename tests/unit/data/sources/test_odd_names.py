"""Folders and files of any name: what wildcards, braces and Hydra's grammar take apart is a name where it exists."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from swinv2_train.config.arguments import prepared
from swinv2_train.config.keys import all_keys
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.manifest import MANIFEST_NAME
from swinv2_train.data.shards.pattern import expand_pattern
from swinv2_train.data.shards.tar_writer import shard_files, write_shards
from swinv2_train.data.sources.base import open_source
from swinv2_train.make_shards import run as make_shards
from tests.support.configs import composed
from tests.support.images import image_bytes
from tests.support.shard_files import ODD_NAME, samples

NAMES = [
    "runs[1]", "[0-9]", "{a,b}", "{0..3}", "a{b", "}", "*", "what?", "a b", "x=1", "(1)", "~", "a&b", "ü", "u\u0308",
    "'", '"', "a\\b", "$HOME", "#1", "100%", "-x", "a;b", "!", " a ", "a,b", "a|b", "a\nb", "null", "1e-3", ODD_NAME,
]  # fmt: skip


def pixels(pattern: str) -> dict[str, bytes]:
    """The images of a source by their keys."""
    source = open_source(pattern)
    reader = source.open_reader()
    found = [reader.read(shard, index) for shard, count in enumerate(source.counts) for index in range(count)]
    reader.close()
    return {each.key: each.image for each in found}


@pytest.mark.parametrize("name", NAMES)
def test_every_source_may_lie_in_a_folder_of_any_name(name, tmp_path):
    """Packed there by the command; named by wildcard, braces and letters, alone and joined; below another such one."""
    images = {f"s{i:04d}": image_bytes(i, size=(8, 8)) for i in range(4)}
    source = tmp_path / name / "images" / name
    source.mkdir(parents=True)
    for key, image in images.items():
        (source / f"{key}.png").write_bytes(image)
    assert pixels(str(source)) == {f"{key}": image for key, image in images.items()}
    out = tmp_path / name / name / name  # the prefix of the shards' names too
    assert make_shards([str(source), str(out), "--samples-per-shard", "2"]) == 0
    files = [str(path) for path in shard_files(str(out))]
    assert len(files) == 2 and files[0] == f"{out}-000000.tar"
    for pattern in (
        f"{out.parent}/*.tar",
        f"{out.parent}/*-00000[01].tar",
        "::".join(files),
        f"file://{files[0]}::{files[1]}",
    ):
        assert expand_pattern(pattern) == files, pattern
        assert pixels(pattern).keys() == images.keys(), pattern
    if not {*name} & {*"{}\\"}:  # those of a pattern itself are guarded by a backslash
        assert expand_pattern(f"{out.parent}/{name}-{{000000..000001}}.tar") == files
    assert make_shards([str(source), str(out), "--samples-per-shard", "4", "--overwrite"]) == 0
    assert [path.name for path in shard_files(str(out))] == [f"{name}-000000.tar"]
    Path(files[0]).unlink()
    (out.parent / "other.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=MANIFEST_NAME):
        expand_pattern(f"{out.parent}/*.tar")


@pytest.mark.parametrize("name", ["data[1]", "{a,b}", "*", ODD_NAME])
def test_an_archive_of_any_name_is_packed(name, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"{name.strip()}/a.png", image_bytes(0, size=(8, 8)))
    (tmp_path / f"{name}.zip").write_bytes(buffer.getvalue())
    assert make_shards([str(tmp_path / f"{name}.zip"), str(tmp_path / name / "t")]) == 0
    assert len(pixels(f"{tmp_path}/{name}/t-*.tar")) == 1


def test_a_name_goes_before_a_pattern_and_a_pattern_stays_one(tmp_path):
    """Where both are there, the letters count; where no such folder is, brackets and braces are what they were."""
    for folder in ("run1", "run2", "run[12]", "a", "b"):
        write_shards(samples(2), str(tmp_path / folder / "t"), 2)
    paths = {folder: f"{tmp_path}/{folder}/t-000000.tar" for folder in ("run1", "run2", "run[12]", "a", "b")}
    assert expand_pattern(f"{tmp_path}/run[12]/*.tar") == [paths["run[12]"]]
    assert expand_pattern(f"{tmp_path}/run[1-2]/*.tar") == [paths["run1"], paths["run2"]]
    assert expand_pattern(f"{tmp_path}/{{b,a}}/*.tar") == [paths["b"], paths["a"]]
    (tmp_path / "{b,a}").mkdir()
    with pytest.raises(ShardError, match="matches no file"):
        expand_pattern(f"{tmp_path}/{{b,a}}/*.tar")
    with pytest.raises(ShardError, match=r"runs\[1\]/t-000000.tar', which does not exist|matches no file"):
        expand_pattern(f"{tmp_path}/runs[1]/t-000000.tar")


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_path_keeps_its_letters(name):
    """As typed behind KEY=, when the shell has left them alone."""
    keys = {key.name for key in all_keys()}
    named = {"run_dir", "data.shards", "data.eval_shards", "data.cache_dir", "data.eval_labels", "task.init_from",
             "engine.nvme_dir"} & keys  # fmt: skip
    assert {"run_dir", "data.shards", "data.eval_shards", "data.cache_dir", "task.init_from"} <= named
    given = dict.fromkeys(named, f"/d/{name}/{name}")
    words = ["experiment=cifar10_finetune", *(f"{key}={value}" for key, value in given.items())]
    config = composed(prepared(words))
    for key, value in given.items():
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value
