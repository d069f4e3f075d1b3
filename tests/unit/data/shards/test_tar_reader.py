"""Shards: what others wrote is read, what we wrote others read, and no damage to a shard goes unnoticed."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from swinv2_train.config import ConfigError
from swinv2_train.data.sample import SampleError, ShardError
from swinv2_train.data.shards.pattern import expand_commands, expand_pattern
from swinv2_train.data.shards.tar_index import build_index
from swinv2_train.data.shards.tar_reader import TarReader, open_manifest, reindex, verify_shards
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.sources.base import open_source
from swinv2_train.data.sources.pipe import read_command
from swinv2_train.data.transforms.decode import DecodeError, decode_image
from tests.support.configs import composed
from tests.support.images import encoded, image_bytes
from tests.support.shard_files import samples, write_plain_tar


def test_written_shards_are_read_back_by_webdataset(tmp_path):
    """Our shards must work with any webdataset reader."""
    import webdataset

    written = samples(7)
    manifest = write_shards(written, str(tmp_path / "train"), samples_per_shard=3)
    assert manifest.counts == (3, 3, 1)
    urls = [str(path) for path in manifest.paths]
    read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [(s["__key__"], s["png"], s["cls"]) for s in read] == [(k, d, str(c).encode()) for k, d, _, c in written]


def test_the_reader_returns_what_was_written_in_any_order_and_after_pickling(tmp_path):
    written = samples(10)
    manifest = write_shards(written, str(tmp_path / "a" / "train"), samples_per_shard=4)
    reader = pickle.loads(pickle.dumps(TarReader(manifest, max_open=1)))
    for number in (9, 0, 5, 3, 8, 1):
        sample = reader.read(number // 4, number % 4)
        assert (sample.key, sample.image, sample.extension, sample.targets.get("label")) == written[number]
        assert reader.key(number // 4, number % 4) == sample.key
    assert manifest.label_range == (0, 4) and manifest.unlabelled == (0, 0, 0)


def test_shards_of_plain_webdataset_are_read_with_pax_headers_and_several_extensions(tmp_path):
    """webdataset's own default writes a float mtime, hence a PAX header for every member."""
    from webdataset import TarWriter

    path = tmp_path / "others.tar"
    long_key = "ordner/" + "ü" * 120
    kinds = ["jpg", "png", "webp", "JPEG"]
    with TarWriter(str(path)) as writer:
        for number, kind in enumerate(kinds):
            key = long_key if number == 1 else f"k{number}"
            writer.write({"__key__": key, kind: image_bytes(number, kind.lower()), "cls": number, "json": {"a": 1}})
        writer.write({"__key__": "unlabelled", "png": image_bytes(9)})
    assert b"mtime=" in path.read_bytes()  # else this test would not see PAX
    manifest = open_manifest(str(path))
    reader = TarReader(manifest)
    read = [reader.read(0, number) for number in range(5)]
    assert [s.extension for s in read] == ["jpg", "png", "webp", "jpeg", "png"]
    assert [s.targets.get("label") for s in read] == [0, 1, 2, 3, None]
    assert read[1].key == long_key and read[1].image == image_bytes(1)
    assert manifest.unlabelled == (1,)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_offsets_equal_tarfiles_own_in_every_format(tmp_path, form):
    """The header parser is ours (tarfile is ten times slower), so tarfile checks it."""
    names = ["a.png", "x" * 80 + "/" + "y" * 60 + ".png", "dir.with.dots/b.png", "./c.png"]
    if form != tarfile.USTAR_FORMAT:
        names.append("z" * 150 + ".png")
    path = write_plain_tar(tmp_path / "t.tar", [(n, image_bytes(i)) for i, n in enumerate(names)], format=form)
    index = build_index(str(path))
    with tarfile.open(path) as tar:
        expected = [(m.name.removesuffix(".png"), m.offset_data, m.size) for m in tar]
    assert [(r["key"].decode(), r["offset"], r["size"]) for r in index] == expected


def test_directories_links_and_webdatasets_meta_members_are_passed_over(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("cat")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
        for name in ("__meta__/x.png", "cat/a.png", "cat/a.seg.png", "README"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"abcd"))
    assert [key.decode() for key in build_index(str(path))["key"]] == ["cat/a"]


@pytest.mark.parametrize("piped", [False, True])
def test_members_that_may_have_been_meant_as_images_are_said(tmp_path, piped):
    """Whoever packs links, or files without an ending, trains on fewer images than there are, and hears nothing."""
    path = write_plain_tar(tmp_path / "t.tar", [(name, b"abcd") for name in ("a.png", "0001", "b/0002", "__meta__")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
    with pytest.warns(UserWarning, match=r"t.tar: members are passed over: 2 without an ending, 1 links"):
        assert len(list(read_command(f"cat {path}")) if piped else build_index(str(path))) == 1


def _damage(name: str, path: Path) -> None:
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[10]
        start, data_start = middle.offset, middle.offset_data
    if name == "cut inside a member":
        data = data[: data_start + 10]
    elif name == "cut at a member border":
        data = data[:start]
    elif name == "zeroed header":
        data[start : start + 512] = bytes(512)
    elif name == "corrupt header":
        data[start + 5] ^= 0xFF
    elif name == "appended tar":
        data = data + data
    elif name == "0 bytes":
        data = bytearray()
    elif name == "not a tar":
        data = bytearray(b"hello" * 1000)
    elif name == "gzip":
        import gzip

        data = bytearray(gzip.compress(bytes(data)))
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut inside a member", "cut off at byte .* the member at byte"),
        ("cut at a member border", "no end mark"),
        ("zeroed header", "non-zero bytes at byte .* after the end mark"),
        ("corrupt header", "damaged header at byte"),
        ("appended tar", "non-zero bytes at byte .* after the end mark"),
        ("0 bytes", r"empty \(0 bytes\)"),
        ("not a tar", "not a tar file"),
        ("gzip", "compressed tar has no random access"),
    ],
)
def test_every_damage_that_webdataset_passes_over_is_an_error_that_names_the_shard(tmp_path, name, message):
    path = tmp_path / "t.tar"
    write_plain_tar(
        path, [(f"s{i}.{e}", image_bytes(i) if e == "png" else b"3") for i in range(20) for e in ("png", "cls")]
    )
    assert len(build_index(str(path))) == 20
    _damage(name, path)
    with pytest.raises(ShardError, match=f"t.tar: .*{message}"):
        open_manifest(str(path))


def test_a_long_legal_tail_of_zeros_is_no_damage(tmp_path):
    path = write_plain_tar(tmp_path / "t.tar", [("a.png", image_bytes(0))])
    path.write_bytes(path.read_bytes() + bytes(11_000))
    assert len(build_index(str(path))) == 1


def test_headers_whose_checksum_sums_up_signed_bytes_are_right_too(tmp_path):
    """Old tars wrote them, of names beyond ASCII; tarfile takes both."""
    path = write_plain_tar(tmp_path / "t.tar", [("\u00e9\u00e8.png", image_bytes(0))], format=tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    signed = sum(byte - 256 if byte > 127 else byte for byte in data[:148] + data[156:512]) + 8 * 32
    data[148:156] = b"%06o\0 " % signed
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 1
    assert len(build_index(str(path))) == 1


def test_the_same_member_twice_is_an_error(tmp_path):
    path = write_plain_tar(tmp_path / "t.tar", [(n, image_bytes(0)) for n in ("a.png", "b.png", "a.png")])
    with pytest.raises(ShardError, match="the key 'a' has two .png members"):
        open_manifest(str(path))


def test_an_empty_tar_is_warned_about_and_all_empty_is_an_error(tmp_path):
    write_plain_tar(tmp_path / "empty.tar", [])
    write_plain_tar(tmp_path / "full.tar", [("a.png", image_bytes(0))])
    with pytest.warns(UserWarning, match=r"empty.tar: the shard holds no samples"):
        manifest = open_manifest(str(tmp_path / "*.tar"))
    assert manifest.counts == (0, 1)
    with pytest.raises(ShardError, match="all 1 shards are empty"):
        open_manifest(str(tmp_path / "empty.tar"))


def test_a_tar_without_images_names_what_it_holds(tmp_path):
    path = write_plain_tar(tmp_path / "t.tar", [("a.txt", b"x"), ("a.json", b"{}")])
    with pytest.raises(ShardError, match="no image in it .members end in: json, txt."):
        open_manifest(str(path))


@pytest.mark.parametrize("text", [b"", b"-1", b"1.0", b"9" * 30, b"9" * 70, b"1" + b" " * 70, "\u0663".encode()])
def test_a_label_that_is_no_class_number_counts_as_none(tmp_path, text):
    """A huge one overflowed the index, a long one was cut to another number."""
    manifest = open_manifest(str(write_plain_tar(tmp_path / "t.tar", [("a.png", image_bytes(0)), ("a.cls", text)])))
    assert manifest.unlabelled == (1,) and manifest.label_range is None


def test_a_damaged_pax_header_is_an_error(tmp_path):
    """Its content has no checksum, and a negative size would send the reader backwards for ever."""
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = 8, {"size": "-512"}
        tar.addfile(info, io.BytesIO(bytes(8)))
    with pytest.raises(ShardError, match="t.tar: damaged PAX header"):
        open_manifest(str(path))


def test_a_sample_error_keeps_its_parts_between_processes():
    """Worker processes hand their errors over pickled."""
    error = pickle.loads(pickle.dumps(SampleError("no image", "t.tar", "k1")))
    assert (str(error), error.shard, error.key, error.cause) == (
        "t.tar: sample 'k1': no image",
        "t.tar",
        "k1",
        "no image",
    )


def test_samples_without_image_or_with_a_bad_label_are_known_from_the_index(tmp_path):
    members = [("a.png", image_bytes(0)), ("a.cls", b"x"), ("b.cls", b"1"), ("c.png", b""), ("c.cls", b"2\n")]
    manifest = open_manifest(str(write_plain_tar(tmp_path / "t.tar", members)))
    assert manifest.unlabelled == (1,) and manifest.label_range == (1, 2)
    reader = TarReader(manifest)
    assert reader.read(0, 0).targets.get("label") is None
    with pytest.raises(SampleError, match="sample 'b': no image"):
        reader.read(0, 1)
    with pytest.raises(SampleError, match="sample 'c': an empty image"):
        reader.read(0, 2)


def test_a_shard_whose_size_changed_is_refused_and_reindex_accepts_it(tmp_path):
    manifest = write_shards(samples(4), str(tmp_path / "t"), 4)
    path = Path(manifest.paths[0])
    old = path.stat().st_size
    write_plain_tar(path, [(f"{i}.png", image_bytes(i, size=(40, 40))) for i in range(6)])
    with pytest.raises(
        ShardError, match=rf"t-000000.tar: {path.stat().st_size} bytes, manifest says {old}; .*--reindex"
    ):
        open_manifest(str(path))
    fresh = reindex(str(path))
    assert fresh.counts == (6,) and fresh.digest != manifest.digest
    assert open_manifest(str(path)) == fresh


def test_a_shard_that_shrinks_during_the_run_is_a_shard_error(tmp_path):
    """A shard fault must never pass as a damaged sample, which a policy may replace."""
    manifest = write_shards(samples(4), str(tmp_path / "t"), 4)
    reader = TarReader(manifest)
    reader.read(0, 0)
    os.truncate(manifest.paths[0], 2000)
    with pytest.raises(ShardError, match="ends before byte"):
        reader.read(0, 3)
    with pytest.raises(ShardError, match="changed since the run started"):
        TarReader(manifest).read(0, 0)


def test_verify_notices_one_flipped_bit(tmp_path):
    path = Path(write_shards(samples(4), str(tmp_path / "t"), 4).paths[0])
    verify_shards(str(path))
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))  # with its new date the start finds it already
    open_manifest(str(path))
    with pytest.raises(ShardError, match="checksum differs"):
        verify_shards(str(path))


def test_a_shard_written_anew_at_the_same_size_is_found_by_its_date(tmp_path):
    """Other content under offsets that still fit would be read as damaged images, or as wrong ones."""
    path = Path(write_shards(samples(4), str(tmp_path / "t"), 4).paths[0])
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"t-000000.tar: changed since it was indexed, at the same size; .*--reindex"):
        open_manifest(str(path))
    assert reindex(str(path)) == open_manifest(str(path))


def test_a_shard_that_was_only_copied_is_read_once_and_believed(tmp_path):
    """A copy is younger than its index; hashing terabytes at every start would be no remedy."""
    manifest = write_shards(samples(4), str(tmp_path / "t"), 4)
    os.utime(manifest.paths[0], ns=(2**62, 2**62))
    young = os.stat(manifest.index_paths[0]).st_mtime_ns
    assert open_manifest(manifest.paths[0]) == manifest
    assert os.stat(manifest.index_paths[0]).st_mtime_ns > young
    os.utime(manifest.paths[0])
    os.utime(manifest.index_paths[0])
    Path(manifest.paths[0]).chmod(0o000)  # not for root, so the next line also shows that nothing is hashed
    before = os.stat(manifest.paths[0]).st_atime_ns
    assert open_manifest(manifest.paths[0]) == manifest and os.stat(manifest.paths[0]).st_atime_ns == before


def test_a_wildcard_that_misses_a_listed_shard_is_an_error_and_reindex_forgets_it(tmp_path):
    """A deleted shard would silently make the data set smaller; a manifest beside it knows better."""
    manifest = write_shards(samples(6), str(tmp_path / "t"), 2)
    write_shards(samples(1), str(tmp_path / "other"), 2)
    os.unlink(manifest.paths[1])
    with pytest.raises(ShardError, match=r"t-000001.tar is missing, manifest.json lists it .1 such.*--reindex"):
        open_manifest(f"{tmp_path}/t-*.tar")
    assert open_manifest(f"{tmp_path}/other-*.tar").counts == (1,)
    with pytest.raises(ShardError, match=r"names '.*t-000001.tar', which does not exist"):
        open_manifest(f"{tmp_path}/t-{{000000..000002}}.tar")
    assert reindex(f"{tmp_path}/t-*.tar").counts == (2, 2)
    assert open_manifest(f"{tmp_path}/t-*.tar").counts == (2, 2)


def test_a_lost_index_is_made_again_and_the_checksum_compared(tmp_path):
    manifest = write_shards(samples(4), str(tmp_path / "t"), 4)
    os.unlink(manifest.index_paths[0])
    assert open_manifest(manifest.paths[0]) == manifest
    os.unlink(manifest.index_paths[0])
    data = bytearray(Path(manifest.paths[0]).read_bytes())
    data[700] ^= 1
    Path(manifest.paths[0]).write_bytes(data)
    with pytest.raises(ShardError, match="checksum differs"):
        open_manifest(manifest.paths[0])


def test_the_digest_depends_on_content_and_order_but_not_on_the_folder(tmp_path):
    first = write_shards(samples(6), str(tmp_path / "a" / "t"), 3)
    second = write_shards(samples(6), str(tmp_path / "b" / "t"), 3)
    assert first.digest == second.digest  # the bytes of a shard are reproducible too
    assert open_manifest("::".join(reversed(first.paths))).digest != first.digest


def test_patterns_expand_braces_wildcards_and_parts(tmp_path):
    write_shards(samples(6), str(tmp_path / "a"), 2)
    write_shards(samples(1), str(tmp_path / "b"), 2)
    names = [os.path.basename(p) for p in expand_pattern(f"{tmp_path}/a-{{000001..000002}}.tar::{tmp_path}/b-*.tar")]
    assert names == ["a-000001.tar", "a-000002.tar", "b-000000.tar"]


def test_patterns_that_match_nothing_name_key_pattern_and_remedy(tmp_path):
    with pytest.raises(ShardError, match=r"data.shards '.*/\*.tar' matches no file; .*swinv2-make-shards"):
        open_manifest(f"{tmp_path}/*.tar")
    with pytest.raises(ShardError, match=r"data.eval_shards names '.*x-0.tar', which does not exist; .*make-shards"):
        open_manifest(f"{tmp_path}/x-{{0..3}}.tar", key="data.eval_shards")
    with pytest.raises(ShardError, match="is a folder; name its shards"):
        open_manifest(str(tmp_path))
    with pytest.raises(ShardError, match="is not a local path"):
        open_manifest("https://host/x.tar")
    path = write_shards(samples(1), str(tmp_path / "t"), 2).paths[0]
    with pytest.raises(ShardError, match="twice"):
        open_manifest(f"{path}::{path}")


def test_writing_refuses_existing_shards_and_doubled_keys_and_leaves_nothing_half_done(tmp_path):
    doubled = samples(5) + samples(1)
    with pytest.raises(ShardError, match="the key 's0000' comes twice"):
        write_shards(doubled, str(tmp_path / "t"), 2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ShardError, match="there is no sample"):
        write_shards([], str(tmp_path / "t"), 2)
    write_shards(samples(2), str(tmp_path / "t"), 2)
    with pytest.raises(ShardError, match="exists already"):
        write_shards(samples(2), str(tmp_path / "t"), 2)


def test_rewriting_deleted_shards_forgets_their_old_entries(tmp_path):
    for path in write_shards(samples(4), str(tmp_path / "t"), 2).paths:
        os.unlink(path)
    assert write_shards(samples(3), str(tmp_path / "t"), 3).counts == (3,)
    assert open_manifest(f"{tmp_path}/t-*.tar").counts == (3,)  # the second one is not missed


def _open(path: str) -> str:
    return open_manifest(path).digest


def test_processes_that_index_at_once_agree_and_lose_no_entry(tmp_path):
    """On first use every rank may arrive together, and two runs may index different shards of a folder."""
    names = "abcdefgh"
    for name in names:
        write_plain_tar(tmp_path / f"{name}.tar", [(f"{i}.png", image_bytes(i)) for i in range(3)])
    patterns = [f"{tmp_path}/{name}.tar" for name in names] * 4
    with multiprocessing.get_context("fork").Pool(8) as pool:
        digests = pool.map(_open, patterns, chunksize=1)
    assert digests[:8] == digests[8:16] == digests[16:24] == digests[24:]
    assert sorted(json.loads((tmp_path / "manifest.json").read_text())["shards"]) == [f"{name}.tar" for name in names]
    assert not list(tmp_path.glob("*.tmp"))


def test_shards_in_a_read_only_folder_are_indexed_in_the_users_cache(tmp_path, monkeypatch):
    """Shared data sets on clusters are read-only; root ignores modes, so the answer of access() is exchanged."""
    folder = tmp_path / "shared"
    folder.mkdir()
    path = write_plain_tar(folder / "t.tar", [("a.png", image_bytes(0))])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    manifest = open_manifest(str(path))
    assert TarReader(manifest).read(0, 0).image == image_bytes(0)
    assert list(folder.iterdir()) == [path]
    assert open_manifest(str(path)) == manifest and len(list((tmp_path / "cache").rglob("manifest.json"))) == 1


def test_a_process_that_may_open_few_files_reads_on_with_fewer_shards_open(tmp_path):
    """With `ulimit -n 64` and a wide window, a run ended with "Too many open files" in its second minute."""
    import resource

    samples = [(f"k{i:03d}", b"image %d" % i, "png", None) for i in range(60)]
    manifest = write_shards(samples, str(tmp_path / "t"), 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    reader = TarReader(manifest, max_open=60)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 12, hard))
    try:
        for _ in range(2):
            assert [reader.read(shard, 0).image for shard in range(60)] == [image for _, image, _, _ in samples]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        reader.close()


# --------------------------------------------------------------------------------------------------------------------
# data.verify


def flip(path: Path, at: int) -> None:
    """Change one bit, as a disk or a transfer does: size and date stay."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def jpeg_shard(folder: Path) -> Path:
    picture = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = encoded(np.kron(picture, np.ones((8, 8, 1), np.uint8)), "JPEG", quality=95)
    write_shards([(f"k{i}", image, "jpg", i) for i in range(4)], str(folder / "t"), 4)
    return folder / "t-000000.tar"


def test_a_flipped_bit_that_no_format_notices_is_a_damaged_sample_with_verify(tmp_path):
    """Of the flips in a JPEG's pixels most give another picture and no error."""
    path = jpeg_shard(tmp_path)
    offset, size = (int(open_index(path)[field][2]) for field in ("offset", "size"))
    for at in range(offset + size - 200, offset + size - 100):
        flip(path, at)
        trusting, comparing = (TarReader(open_manifest(str(path), verify=verify)) for verify in (False, True))
        image = trusting.read(0, 2).image
        with pytest.raises(
            SampleError, match=rf"t-000000.tar: sample 'k\d': its checksum is another .* at byte {offset}"
        ):
            comparing.read(0, 2)
        assert len(comparing.read(0, 1).image) == size
        if decodes(image):
            return
        flip(path, at)
    raise AssertionError("no flip of this picture goes unnoticed")


def decodes(image: bytes) -> bool:
    try:
        decode_image(image, "jpg")
    except DecodeError:
        return False
    return True


def open_index(path: Path) -> np.ndarray:
    return np.load(f"{path}.idx.npy")


def without_checksums(path: Path) -> None:
    """The index as version 0.2 made it."""
    index = open_index(path)
    old = np.zeros(len(index), [each for each in index.dtype.descr if each[0] != "crc32"])
    for field in old.dtype.names:
        old[field] = index[field]
    np.save(f"{path}.idx.npy", old)


def test_an_index_without_checksums_is_read_and_made_again_where_they_are_asked_for(tmp_path):
    path = jpeg_shard(tmp_path)
    plain = [TarReader(open_manifest(str(path))).read(0, i) for i in range(4)]
    without_checksums(path)
    assert [TarReader(open_manifest(str(path))).read(0, i) for i in range(4)] == plain
    assert "crc32" not in open_index(path).dtype.names
    assert [TarReader(open_manifest(str(path), verify=True)).read(0, i) for i in range(4)] == plain
    assert "crc32" in open_index(path).dtype.names
    without_checksums(path)
    flip(path, int(open_index(path)["offset"][1]) + 100)
    with pytest.raises(ShardError, match="its checksum differs from the manifest"):
        open_manifest(str(path), verify=True)


def test_what_has_no_checksums_cannot_be_verified(tmp_path):
    """A key that did nothing would be a promise."""
    (tmp_path / "1.png").write_bytes(image_bytes(0))
    with pytest.raises(ShardError, match=r"data.verify=true, but data.eval_shards '.*' is a directory.*; pack it"):
        open_source(str(tmp_path), "data.eval_shards", verify=True)
    with pytest.raises(ConfigError, match="data.verify=true, but data.shards is a pipe"):
        composed(
            [
                "run_dir=x",
                "data.shards='pipe:cat x.tar'",
                "data.verify=true",
                "train.max_steps=9",
                "optim.schedule.warmup_steps=1",
            ]
        )


def test_a_backslash_is_one_unless_it_guards_a_brace(tmp_path):
    """Names and commands may hold them; they were dropped, so that such a file was not found."""
    folder = tmp_path / "a\\b \\x"
    folder.mkdir()
    for name in ("t-0.tar", "t-1.tar", "{0..1}.tar", "[0].tar"):
        (folder / name).touch()
    assert expand_pattern(f"{folder}/t-{{0..1}}.tar") == [f"{folder}/t-0.tar", f"{folder}/t-1.tar"]
    assert expand_pattern(f"{folder}/t-*.tar") == [f"{folder}/t-0.tar", f"{folder}/t-1.tar"]
    assert expand_pattern(f"{folder}/\\{{0..1\\}}.tar") == [f"{folder}/{{0..1}}.tar"]
    assert expand_pattern(f"{folder}/[0].tar") == [f"{folder}/[0].tar"]  # it is there by this name
    assert expand_commands(r"pipe:sed 's/\t/\\/' {a,b}.tar") == [r"sed 's/\t/\\/' a.tar", r"sed 's/\t/\\/' b.tar"]
