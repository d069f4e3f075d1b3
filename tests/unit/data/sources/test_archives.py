"""Zips and tars of images: every image of a sound one, and for anything else one message, exit code 2, nothing left."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from swinv2_train import make_shards
from swinv2_train.data.packing import read_source
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.tar_reader import TarReader, open_manifest
from swinv2_train.data.sources.archives import open_archive
from swinv2_train.data.sources.folder import open_folder
from tests.support.images import image_bytes

FILES = {
    f"data/{name}/{number}.png": image_bytes(10 * number + len(name))
    for name in ("ape", "cat", "dog2")
    for number in range(4)
}
TARS = (
    "cut at a member",
    "cut in a member",
    "corrupt header",
    "zeroed header",
    "no end mark",
    "appended",
    "garbage after",
)


def write_tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]] = FILES, **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, files: dict[str, bytes] = FILES, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, method
            archive.writestr(info, data)
    return path


def packed(folder: Path) -> dict[str, tuple[int | None, bytes]]:
    manifest = open_manifest(f"{folder}/t-*.tar")
    reader = TarReader(manifest)
    read = [reader.read(shard, i) for shard, count in enumerate(manifest.counts) for i in range(count)]
    return {sample.key: (sample.targets.get("label"), sample.image) for sample in read}


EXPECTED = {
    name.removeprefix("data/").removesuffix(".png"): (["ape", "cat", "dog2"].index(name.split("/")[1]), data)
    for name, data in FILES.items()
}


def pack(source: Path, tmp_path: Path) -> int:
    return make_shards.run([str(source), str(tmp_path / "out" / "deep" / "t")])


def refused(source: Path, tmp_path: Path, capsys) -> str:
    """The one line that make_shards.py ends with; nothing may be left behind."""
    assert pack(source, tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"make_shards: SOURCE {source}"), error
    assert not (tmp_path / "out").exists()
    return error


# --------------------------------------------------------------------------------------------------------------------
# Tars


def damaged_tar(kind: str, path: Path) -> Path:
    data = bytearray(write_tar(path).read_bytes())
    with tarfile.open(path) as tar:
        middle, end = tar.getmembers()[6].offset, tar.getmembers()[-1].offset_data
    if kind == "cut at a member":
        data = data[:middle]
    elif kind == "cut in a member":
        data = data[: middle + 700]
    elif kind == "corrupt header":
        data[middle + 5] ^= 0xFF
    elif kind == "zeroed header":
        data[middle : middle + 512] = bytes(512)
    elif kind == "no end mark":
        data = data[: end + 512]
    elif kind == "appended":
        data = data + data
    elif kind == "garbage after":
        data += b"garbage"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", TARS)
def test_a_tar_that_shards_refuse_is_not_packed_either(tmp_path, capsys, kind):
    """Two readers of one format disagreed: half of the images were packed, with exit code 0."""
    path = damaged_tar(kind, tmp_path / "x.tar")
    with pytest.raises(ShardError) as index_error:
        open_manifest(str(path))
    error = refused(path, tmp_path, capsys)
    assert str(index_error.value).removeprefix(f"{path}: ") in error and "at byte" in error


def test_a_member_that_comes_twice_is_refused(tmp_path, capsys):
    """`tar -r` appends a newer one; which of them counts, readers do not agree on."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a/1.png", "b/2.png", "./a/1.png"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"abcd"))
    assert "the member './a/1.png' comes twice" in refused(path, tmp_path, capsys)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_form_give_all_images(tmp_path, form):
    files = {f"data/ape/{'long' * 20}/{'name' * 15}.png": image_bytes(99), **FILES}
    if form != tarfile.USTAR_FORMAT:
        files |= {f"data/ape/{'x' * 140}.png": image_bytes(98)}
    assert pack(write_tar(tmp_path / "x.tar", files, format=form), tmp_path) == 0
    assert len(packed(tmp_path / "out" / "deep")) == len(files)


def test_links_within_a_tar_are_their_targets_and_others_are_refused(tmp_path, capsys):
    """tar stores the second of two hard-linked files as a link: it was lost without a word."""
    path = write_tar(tmp_path / "x.tar")

    def add(name: str, kind: bytes, target: str) -> None:
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, 0
            tar.addfile(info)

    add("data/cat/hard.png", tarfile.LNKTYPE, "data/ape/1.png")
    add("data/cat/soft.png", tarfile.SYMTYPE, "../ape/2.png")
    add("data/cat/README", tarfile.SYMTYPE, "/usr/share/doc")
    assert pack(path, tmp_path) == 0
    read = packed(tmp_path / "out" / "deep")
    assert read["cat/hard"] == (1, FILES["data/ape/1.png"]) and read["cat/soft"] == (1, FILES["data/ape/2.png"])
    for number, (name, target) in enumerate([("cat/out.png", "/etc/passwd"), ("cat/x.png", "x.png"), ("eel", "ape")]):
        path = write_tar(tmp_path / f"{number}.tar")
        add(f"data/{name}", tarfile.SYMTYPE, target)
        assert f"'data/{name}' is a link to '{target}', which is no file of the archive" in refused(
            path, tmp_path / str(number), capsys
        )


def test_members_that_are_no_files_are_refused_by_name(tmp_path, capsys):
    path = write_tar(tmp_path / "x.tar")
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("data/cat/pipe.png")
        info.type = tarfile.FIFOTYPE
        tar.addfile(info)
    assert "'data/cat/pipe.png' is no file" in refused(path, tmp_path, capsys)


def test_a_tar_that_holds_a_zip_is_a_tar(tmp_path):
    """The end of a zip at the end of a file is what tells one; here the tar's own images were lost for the zip's."""
    inner = write_zip(tmp_path / "inner.zip", {"no/1.png": image_bytes(1), "yes/2.png": image_bytes(2)})
    path = write_tar(tmp_path / "x.tar", {**FILES, "data/ape/z.zip": inner.read_bytes()})
    assert pack(path, tmp_path) == 0
    assert packed(tmp_path / "out" / "deep") == EXPECTED


@pytest.mark.parametrize("cut", [1, 2])
def test_compressed_tars_are_refused_whole_or_cut(tmp_path, capsys, cut):
    data = gzip.compress(write_tar(tmp_path / "x.tar").read_bytes())
    path = tmp_path / "x.tar.gz"
    path.write_bytes(data[: len(data) // cut])
    assert "is not a folder, zip or uncompressed tar" in refused(path, tmp_path, capsys)


def test_a_name_of_megabytes_is_a_damaged_header(tmp_path, capsys):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    path = tmp_path / "x.tar"
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    error = refused(path, tmp_path, capsys)
    assert "a name or PAX record of 8589934592 bytes at byte 0" in error and len(error) < 400


# --------------------------------------------------------------------------------------------------------------------
# Zips


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zips_of_every_usual_method_give_all_images(tmp_path, method):
    assert pack(write_zip(tmp_path / "x.zip", method=method), tmp_path) == 0
    assert packed(tmp_path / "out" / "deep") == EXPECTED


def test_backslashes_between_folders_keep_the_labels(tmp_path):
    """PowerShell's Compress-Archive writes them; all images were one folder without classes, exit code 0."""
    path = write_zip(tmp_path / "x.zip", {name.replace("/", "\\"): data for name, data in FILES.items()})
    assert pack(path, tmp_path) == 0
    assert packed(tmp_path / "out" / "deep") == EXPECTED


def test_a_zip_written_into_a_pipe_has_its_sizes_behind_the_content(tmp_path):
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            self.data += data
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    (tmp_path / "x.zip").write_bytes(pipe.data)
    assert pack(tmp_path / "x.zip", tmp_path) == 0 and packed(tmp_path / "out" / "deep") == EXPECTED


def test_zip64_and_a_program_in_front_are_read(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in FILES.items():
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(data)
    path.write_bytes(b"MZ self-extracting program" * 100 + path.read_bytes())
    assert pack(path, tmp_path) == 0 and packed(tmp_path / "out" / "deep") == EXPECTED


def headers(data: bytearray) -> list[tuple[int, int]]:
    """Where the local and the central header of each member begin, in order."""

    def places(mark: bytes) -> list[int]:
        found, at = [], data.find(mark)
        while at >= 0:
            found.append(at)
            at = data.find(mark, at + 4)
        return found

    return list(zip(places(b"PK\x03\x04"), places(b"PK\x01\x02"), strict=True))


def encrypt(data: bytearray) -> None:
    for local, central in headers(data):
        data[local + 6] |= 1
        data[central + 8] |= 1


def deflate64(data: bytearray) -> None:
    for local, central in headers(data):
        data[local + 8] = data[central + 10] = 9


def unknown_method(data: bytearray) -> None:
    for local, central in headers(data):
        data[local + 8] = data[central + 10] = 77


def bad_crc(data: bytearray) -> None:
    local, _ = headers(data)[5]
    start = local + 30 + sum(struct.unpack_from("<HH", data, local + 26)) + 60
    data[start : start + 20] = bytes(20)


def size_that_lies(data: bytearray) -> None:
    _, central = headers(data)[5]
    data[central + 24 : central + 28] = struct.pack("<I", 1 << 20)


def entry_lost(data: bytearray) -> None:
    """Out of the directory, with the counts and sizes of its end put right."""
    starts = [central for _, central in headers(data)]
    removed = starts[6] - starts[5]
    end = data.rfind(b"PK\x05\x06")
    for field in (8, 10):
        data[end + field : end + field + 2] = struct.pack("<H", len(starts) - 1)
    data[end + 12 : end + 16] = struct.pack("<I", struct.unpack_from("<I", data, end + 12)[0] - removed)
    del data[starts[5] : starts[6]]


def first_entry_lost(data: bytearray) -> None:
    starts = [central for _, central in headers(data)]
    removed = starts[1] - starts[0]
    end = data.rfind(b"PK\x05\x06")
    for field in (8, 10):
        data[end + field : end + field + 2] = struct.pack("<H", len(starts) - 1)
    data[end + 12 : end + 16] = struct.pack("<I", struct.unpack_from("<I", data, end + 12)[0] - removed)
    del data[starts[0] : starts[1]]


def half_a_directory(data: bytearray) -> None:
    """Fewer entries than its end says."""
    end, starts = data.rfind(b"PK\x05\x06"), [central for _, central in headers(data)]
    data[end + 12 : end + 16] = struct.pack("<I", starts[6] - starts[0])
    del data[starts[6] : end]


def one_place_for_two(data: bytearray) -> None:
    (first, _), (_, second) = headers(data)[:2]
    data[second + 42 : second + 46] = struct.pack("<I", first)


def name_cut_short(data: bytearray) -> None:
    """A zero in the name ends it, and this one becomes the name of a folder, which nobody reads."""
    _, central = headers(data)[1]
    data[central + 46 + 5] = 0


def cut(data: bytearray) -> None:
    del data[len(data) * 2 // 3 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (encrypt, r"the member 'data/ape/0.png' is encrypted; unpack the zip with its password"),
        (deflate64, r"the member 'data/ape/0.png' is compressed by Deflate64, which is not read; unpack it"),
        (unknown_method, "compressed by method 77"),
        (bad_crc, r"the member 'data/cat/1.png' is damaged"),
        (size_that_lies, r"the member 'data/cat/1.png' is damaged"),
        (entry_lost, "a member that its directory does not name at byte"),
        (first_entry_lost, "a member that its directory does not name at byte 0"),
        (half_a_directory, "its directory names 6 members and says 12"),
        (one_place_for_two, "a member that its directory does not name at byte"),
        (name_cut_short, r"the member 'data/\x00pe/1.png' has a damaged name"),
        (cut, "is a damaged zip, cut off perhaps"),
    ],
)
def test_a_zip_that_cannot_be_read_whole_is_one_message_and_leaves_nothing(tmp_path, capsys, damage, message):
    """What a reader of its directory alone does not see: some of these lost images with exit code 0."""
    path = write_zip(tmp_path / "x.zip")
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    assert message in refused(path, tmp_path, capsys)


def test_a_message_carries_no_more_of_a_name_than_tells_it(tmp_path, capsys):
    """A name may have 64 kB in a zip, and a megabyte in a tar."""
    name = "a/" + "x" * 60_000 + ".png"
    for number, path in enumerate(
        [write_zip(tmp_path / "x.zip", {name: b"x"}), write_tar(tmp_path / "x.tar", {name: b"x", f"./{name}": b"y"})]
    ):
        data = bytearray(path.read_bytes())
        if not number:
            encrypt(data)
            path.write_bytes(data)
        assert len(refused(path, tmp_path, capsys)) < 700
    shorter = "x" * 3000 + ".png"
    twice = write_tar(tmp_path / "y.tar", [(shorter, b"x"), (shorter, b"y")])
    with pytest.raises(ShardError) as error:
        open_manifest(str(twice))
    assert "has two .png members" in str(error.value) and len(str(error.value)) < 700


def test_a_small_file_that_claims_much_costs_no_memory(tmp_path, capsys):
    path = write_zip(tmp_path / "x.zip", {"a/1.png": bytes(1 << 20), "b/2.png": b"x"})
    data = bytearray(path.read_bytes())
    _, central = headers(data)[0]
    data[central + 24 : central + 28] = struct.pack("<I", 3_000_000_000)
    path.write_bytes(data)
    assert "'a/1.png' has 3000000000 bytes, which no image has" in refused(path, tmp_path, capsys)


# --------------------------------------------------------------------------------------------------------------------
# Both


@pytest.mark.parametrize(
    "name", ["../up.png", "a/../../up.png", "/etc/x.png", "C:\\data\\x.png", "..\\x.png", "\\\\host\\x.png"]
)
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_a_member_outside_of_the_folder_is_named(tmp_path, capsys, write: Callable[..., Path], name):
    path = write(tmp_path / "x", {**FILES, name: image_bytes(0)})
    error = refused(path, tmp_path, capsys)
    assert f"the member '{name}' lies outside of the archive's folder" in error
    assert {each.name for each in tmp_path.iterdir()} == {"x"}


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_a_class_of_other_files_counts_and_is_said_as_in_a_folder(tmp_path, capsys, write: Callable[..., Path]):
    """Left out in silence it would shift the labels of the classes behind it."""
    path = write(tmp_path / "x", {**FILES, "data/bat/1.heic": b"x"})
    assert pack(path, tmp_path) == 0
    assert "no image in the class folders bat; they count as classes" in capsys.readouterr().out
    assert "bat" in (tmp_path / "out" / "deep" / "classes.txt").read_text().split()


def test_files_that_are_no_images_are_named_by_ending_and_count(tmp_path, capsys):
    others = {"data/cat/a.heic": b"x", "data/cat/b.HEIC": b"x", "data/cat/0123": b"x", "data/.DS_Store": b"x"}
    assert pack(write_zip(tmp_path / "x.zip", {**FILES, **others}), tmp_path) == 0
    said = capsys.readouterr().out
    assert "4 files and hidden folders of" in said and "(2 .heic, 1 without an ending, 1 hidden)" in said
    assert "(4 files: 2 .heic, 1 without an ending, 1 hidden; none named *.jpg" in refused(
        write_zip(tmp_path / "y.zip", others), tmp_path / "y", capsys
    )


@pytest.mark.parametrize("name", ["1.bmp", "1.TIF", "1.tiff", "1.jfif", "1.JPG", "1.Gif", "1.WEBP"])
def test_every_usual_ending_is_packed_from_folder_zip_and_tar_alike(tmp_path, name):
    files = {**FILES, f"data/cat/x{name}": image_bytes(5)}
    for number, write in enumerate([write_zip, write_tar]):
        assert pack(write(tmp_path / f"{number}", files), tmp_path / f"out{number}") == 0
        assert len(packed(tmp_path / f"out{number}" / "out" / "deep")) == 13
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    assert open_folder(str(tmp_path / "data")).num_samples == 13


def test_a_folder_of_names_with_backslashes_is_refused(tmp_path, capsys):
    """Unpacked by a program that does not know Windows' folders: a flat folder, and all labels lost."""
    for name, data in FILES.items():
        (tmp_path / name.replace("/", "\\")).write_bytes(data)
    with pytest.raises(ShardError, match="12 file names hold backslashes .e.g. data.ape.0.png."):
        open_folder(str(tmp_path))
    assert "12 file names hold backslashes" in refused(tmp_path, tmp_path, capsys)


def test_a_packing_that_fails_leaves_the_shards_it_was_to_replace(tmp_path, capsys):
    """--overwrite deleted them before the first image was read."""
    assert pack(write_zip(tmp_path / "x.zip"), tmp_path) == 0
    out = tmp_path / "out" / "deep"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    data = bytearray((tmp_path / "x.zip").read_bytes())
    bad_crc(data)
    (tmp_path / "x.zip").write_bytes(data)
    assert make_shards.run([str(tmp_path / "x.zip"), str(out / "t"), "--overwrite"]) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    many = write_zip(tmp_path / "y.zip")
    arguments = [str(many), str(out / "t"), "--overwrite", "--samples-per-shard"]
    assert make_shards.run([*arguments, "5"]) == 0 and len(list(out.glob("t-*.tar"))) == 3
    assert make_shards.run([*arguments, "12"]) == 0 and len(list(out.glob("t-*.tar"))) == 1
    assert packed(out) == EXPECTED


def test_an_archive_is_looked_at_and_not_read_when_it_is_opened(tmp_path):
    archive = open_archive(write_tar(tmp_path / "x.tar"), "SOURCE x")
    assert set(archive.files) == set(FILES)
    os.truncate(tmp_path / "x.tar", 5000)
    with pytest.raises(ShardError, match="is cut off: the archive changed while it was read"):
        archive.files["data/dog2/3.png"]()


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_no_change_to_an_archive_loses_images_without_a_word(tmp_path, capsys, write: Callable[..., Path]):
    """Whatever was changed: all images, or one message, or a line that counts what is left out."""
    chance = random.Random(0)
    whole = write(tmp_path / "x").read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        at = chance.randrange(len(data)) if chance.random() < 0.5 else len(data) - chance.randrange(1, 1000)
        kind = chance.randrange(4)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at : at + 4] = chance.choice((bytes(4), b"\xff" * 4))
        elif kind == 2:
            del data[at:]
        else:
            del data[at : at + chance.choice((1, 7, 46))]
        (tmp_path / "x").write_bytes(data)
        try:
            entries, _ = read_source(tmp_path / "x")
            content = [entry.read() for entry in entries]
        except ShardError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            continue
        assert len(content) == len(FILES) or "left out" in capsys.readouterr().out
        assert write is write_tar or set(content) <= set(FILES.values())  # a tar has no checksums of content
