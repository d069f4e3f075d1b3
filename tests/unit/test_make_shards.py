"""swinv2-make-shards: folders, zips and tars become shards, byte for byte, with labels nobody has to guess."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from swinv2_train import make_shards
from swinv2_train.data import packing
from swinv2_train.data.shards.tar_reader import TarReader, open_manifest
from swinv2_train.data.sources.base import open_source
from tests.support.images import image_bytes

SCRIPTS = Path(__file__).parents[2] / "scripts"


def image(seed: int, kind: str = "jpg") -> bytes:
    return image_bytes(seed, kind, (6, 6))


FILES = {
    "dog/a.jpg": image(0),
    "dog/b.v2.JPEG": image(1),
    "cat/sub/a.png": image(2, "PNG"),
    "cat/x.webp": image(3, "WEBP"),
    "ape.big/a.jpg": image(4),
}
EXPECTED = {
    "ape.big/a": ("jpg", 0, FILES["ape.big/a.jpg"]),
    "cat/sub/a": ("png", 1, FILES["cat/sub/a.png"]),
    "cat/x": ("webp", 1, FILES["cat/x.webp"]),
    "dog/a": ("jpg", 2, FILES["dog/a.jpg"]),
    "dog/b_v2": ("jpeg", 2, FILES["dog/b.v2.JPEG"]),
}


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["__background__", "two\nlines"])
def test_a_name_that_webdataset_passes_over_is_refused_instead_of_lost(tmp_path, capsys, name):
    """webdataset would read fewer images, and so would the index."""
    source = folder(tmp_path / "images", {**FILES, f"{name}/a.jpg": image(5)})
    assert make_shards.run([str(source), str(tmp_path / "out" / "t")]) == 2
    assert f"pass over the key {f'{name}/a'!r}" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("t-*"))


def test_names_that_are_no_text_are_packed(tmp_path):
    """File names are bytes."""
    source = folder(tmp_path / "images", {"cat/a.jpg": image(0), "d\udcff/\udce9.jpg": image(1)})
    for _ in range(2):  # the second time classes.txt is compared
        assert make_shards.run([str(source), str(tmp_path / "out" / "t"), "--overwrite"]) == 0
    assert packed(f"{tmp_path}/out/t-*.tar")["d\udcff/\udce9"] == ("jpg", 1, image(1))


def packed(pattern: str) -> dict[str, tuple[str, int | None, bytes]]:
    manifest = open_manifest(pattern)
    reader = TarReader(manifest)
    read = [reader.read(shard, i) for shard, count in enumerate(manifest.counts) for i in range(count)]
    assert len({sample.key for sample in read}) == len(read)
    return {sample.key: (sample.extension, sample.targets.get("label"), sample.image) for sample in read}


def test_class_folders_become_labels_in_sorted_order_and_files_are_copied_byte_for_byte(tmp_path, capsys):
    source = folder(tmp_path / "src", {**FILES, "dog/notes.txt": b"x", ".hidden/a.jpg": b"x"})
    assert make_shards.run([str(source), str(tmp_path / "out" / "train"), "--samples-per-shard", "2"]) == 0
    assert packed(f"{tmp_path}/out/train-{{000000..000002}}.tar") == EXPECTED
    assert (tmp_path / "out" / "classes.txt").read_text() == "ape.big\ncat\ndog\n"
    out = capsys.readouterr().out
    assert "2 files and hidden folders of" in out and "5 images in 3 shards" in out
    assert f"{tmp_path}/out/train: 5 of 5 images packed\n" in out


def test_a_long_packing_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    """A line when more than 5 s have passed since the last one: here each look at the clock is 2 s later."""
    monkeypatch.setattr(packing, "time", SimpleNamespace(monotonic=map(float, count(0, 2)).__next__))
    assert make_shards.run([str(folder(tmp_path / "src", FILES)), str(tmp_path / "out" / "t")]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.endswith("images packed")]
    assert said == [f"{tmp_path}/out/t: {number} of 5 images packed" for number in (3, 5)]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_give_the_same_shards_as_the_folder_they_hold(tmp_path, kind):
    """The archive's own top folder is no class."""
    path = tmp_path / f"src.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in FILES.items():
                archive.writestr(f"animals/{name}", data)
            archive.writestr("__MACOSX/animals/._a.jpg", b"x")
    else:
        with tarfile.open(path, "w") as tar:
            for name, data in FILES.items():
                info = tarfile.TarInfo(f"./animals/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert make_shards.run([str(path), str(tmp_path / "a")]) == 0
    assert packed(f"{tmp_path}/a-*.tar") == EXPECTED
    make_shards.run([str(folder(tmp_path / "src", FILES)), str(tmp_path / "b")])
    assert (tmp_path / "a-000000.tar").read_bytes() == (tmp_path / "b-000000.tar").read_bytes()


def test_a_flat_folder_has_no_labels_and_colliding_keys_stay_apart(tmp_path):
    source = folder(tmp_path / "src", {"1.jpg": image(0), "1.png": image(1, "PNG"), "1_.jpg": image(2)})
    assert make_shards.run([str(source), str(tmp_path / "t")]) == 0
    read = packed(f"{tmp_path}/t-*.tar")
    assert len(read) == 3 and {label for _, label, _ in read.values()} == {None}
    assert not (tmp_path / "classes.txt").exists()


def test_the_shuffle_mixes_classes_and_follows_the_seed(tmp_path):
    source = folder(tmp_path / "src", {f"{c}/{i:02d}.jpg": image(i) for c in "ab" for i in range(30)})
    for name, seed in (("x", "0"), ("y", "0"), ("z", "1")):
        make_shards.run([str(source), str(tmp_path / name), "--seed", seed])
    x, y, z = ((tmp_path / f"{name}-000000.tar").read_bytes() for name in "xyz")
    assert x == y != z
    first = [label for _, label, _ in packed(f"{tmp_path}/x-*.tar").values()][:20]
    assert 4 <= sum(label or 0 for label in first) <= 16


def test_a_second_split_gets_the_numbers_of_the_first_ones_classes(tmp_path, capsys):
    """A class that it lacks is fine; one that it has alone would mean something else, or nothing."""
    assert make_shards.run([str(folder(tmp_path / "tr", FILES)), str(tmp_path / "out" / "train")]) == 0
    val = folder(tmp_path / "va", {name: data for name, data in FILES.items() if not name.startswith("cat")})
    assert make_shards.run([str(val), str(tmp_path / "out" / "val")]) == 0
    found = {name.split("/")[0]: label for name, (_, label, _) in packed(f"{tmp_path}/out/val-*.tar").items()}
    assert found == {"ape.big": 0, "dog": 2} and open_manifest(f"{tmp_path}/out/val-*.tar").classes == (
        "ape.big", "cat", "dog",
    )  # fmt: skip
    other = folder(tmp_path / "ot", {"cow/1.jpg": image(1), "dog/2.jpg": image(2)})
    assert make_shards.run([str(other), str(tmp_path / "out" / "other")]) == 2
    assert "lists 3 classes, and not SOURCE's cow (1 such classes)" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("other*"))


def test_a_pack_that_fails_leaves_no_list_of_classes_behind(tmp_path, capsys):
    """The next source may have others."""
    bad = folder(tmp_path / "bad", {"__meta__/a.jpg": image(0), "cat/b.jpg": image(1)})
    assert make_shards.run([str(bad), str(tmp_path / "out" / "t")]) == 2
    assert not (tmp_path / "out" / "classes.txt").exists()
    assert make_shards.run([str(folder(tmp_path / "tr", FILES)), str(tmp_path / "out" / "t")]) == 0
    for path in (tmp_path / "out").glob("t-*"):
        path.unlink()
    new = folder(tmp_path / "new", {"cow/1.jpg": image(1), "dog/2.jpg": image(2)})
    assert make_shards.run([str(new), str(tmp_path / "out" / "t")]) == 0
    assert (tmp_path / "out" / "classes.txt").read_text() == "cow\ndog\n"


def test_numeric_classes_junk_and_empty_folders_are_packed_as_a_folder_is_read(tmp_path, capsys):
    """A run on a folder is the run on its shards: "2" comes before "10", and an empty class keeps its place."""
    names = [f"{number}/{number}.jpg" for number in (0, 1, 2, 9, 10, 11)]
    source = folder(tmp_path / "src", {name: image(number) for number, name in enumerate(names)})
    folder(source, {"@eaDir/a.jpg": b"x", "lost+found/a.jpg": b"x", "2/@eaDir/x/t.jpg": b"x", "#recycle/b.jpg": b"x"})
    (source / "3").mkdir()
    assert make_shards.run([str(source), str(tmp_path / "out" / "t")]) == 0
    assert "no image in the class folders 3; they count as classes" in capsys.readouterr().out
    manifest, unpacked = open_manifest(f"{tmp_path}/out/t-*.tar"), open_source(str(source))
    assert manifest.classes == unpacked.classes == ("0", "1", "2", "3", "9", "10", "11")
    labels = {key: label for key, (_, label, _) in packed(f"{tmp_path}/out/t-*.tar").items()}
    assert labels == {name[:-4]: place for name, place in zip(names, (0, 1, 2, 4, 5, 6), strict=True)}
    reader = unpacked.open_reader()
    read = [reader.read(0, index) for index in range(unpacked.num_samples)]
    assert {sample.key: sample.targets.get("label") for sample in read} == labels


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b"x"}, "holds no images .1 files"),
        ({"a.jpg": b"x", "cat/b.jpg": b"x"}, "1 images in class folders and 1 outside of them .e.g. a.jpg."),
    ],
)
def test_sources_that_cannot_be_packed_exit_2_with_one_message(tmp_path, capsys, files, message):
    import re

    assert make_shards.run([str(folder(tmp_path / "src", files)), str(tmp_path / "t")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_missing_and_compressed_sources_and_existing_shards_exit_2(tmp_path, capsys):
    assert make_shards.run([str(tmp_path / "nowhere"), str(tmp_path / "t")]) == 2
    assert "does not exist" in capsys.readouterr().err
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    assert make_shards.run([str(tmp_path / "x.tar.gz"), str(tmp_path / "t")]) == 2
    assert "uncompressed tar" in capsys.readouterr().err
    source = folder(tmp_path / "src", {"1.jpg": image(0)})
    assert make_shards.run([str(source), str(tmp_path / "t")]) == 0
    assert make_shards.run([str(source), str(tmp_path / "t")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert make_shards.run([str(source), str(tmp_path / "t"), "--overwrite"]) == 0


@pytest.mark.slow
def test_reindex_and_verify_work_as_a_command(tmp_path):
    """As the error texts tell the user to run it."""
    make_shards.run([str(folder(tmp_path / "src", {"1.jpg": image(0)})), str(tmp_path / "t")])
    path = tmp_path / "t-000000.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(30):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = 600
            tar.addfile(info, io.BytesIO(bytes(600)))
    command = [sys.executable, str(SCRIPTS / "make_shards.py")]
    environment = {"PYTHONPATH": str(SCRIPTS.parent)}
    before = subprocess.run(
        [*command, "--verify", str(path)], capture_output=True, text=True, env=environment, check=False
    )
    assert before.returncode == 2 and "manifest says" in before.stderr
    done = subprocess.run(
        [*command, "--reindex", str(path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0 and "30 images in 1 shards" in done.stdout
    assert make_shards.run(["--verify", str(path)]) == 0


def test_files_that_cannot_be_read_or_written_are_one_message(tmp_path, capsys):
    """A dangling link among the images, and a place where nothing can be written."""
    source = tmp_path / "images"
    source.mkdir()
    (source / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert make_shards.run([str(source), str(tmp_path / "out" / "train")]) == 2
    assert make_shards.run([str(source), str(tmp_path / "images" / "gone.jpg" / "x")]) == 2
    assert capsys.readouterr().err.count("make_shards: ") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "SOURCE and OUT missing"),
        (["images"], "OUT missing"),
        (["--verify"], "SOURCE missing"),
        (["--reindex"], "S"),
    ],
)
def test_what_is_missing_is_named_at_once(words, said, capsys):
    """One start says all."""
    with pytest.raises(SystemExit) as left:
        make_shards.run(words)
    assert left.value.code == 2 and f"error: {said}" in capsys.readouterr().err
