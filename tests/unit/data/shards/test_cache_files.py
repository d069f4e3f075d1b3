"""What somebody put into the shard cache is compared, taken away and fetched again; nothing outside is touched."""

from __future__ import annotations

import os
import pickle
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.cache_files import Compared, open_lock_file, open_own, take_away
from swinv2_train.data.shards.manifest import INDEX_SUFFIX
from swinv2_train.data.shards.shard_cache import ShardCache
from swinv2_train.data.shards.tar_reader import Manifest, TarReader, open_manifest
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.shards.transfers import RetryPolicy
from tests.support.images import image_bytes
from tests.support.shard_server import ShardServer, serve

pytestmark = pytest.mark.slow

PATIENCE = RetryPolicy(stall_sec=2.0, give_up_sec=3.0)


@pytest.fixture
def server(tmp_path):
    """2 shards of 3 samples."""
    samples = [(f"k{i}", image_bytes(i, size=(20, 20)), "png", i % 3) for i in range(6)]
    write_shards(samples, str(tmp_path / "served" / "t"), 3)
    with serve(tmp_path / "served") as running:
        yield running


def manifest_of(server: ShardServer, folder: Path) -> Manifest:
    """As a new start opens it: no comparison has been made."""
    return open_manifest(f"{server.url}/t-{{000000..000001}}.tar", cache=ShardCache(str(folder), 2**30, PATIENCE))


def everything(manifest: Manifest) -> list[tuple[str, bytes, object]]:
    reader = TarReader(manifest)
    samples = [reader.read(shard, index) for shard in range(2) for index in range(3)]
    reader.close()
    return [(sample.key, sample.image, sample.targets) for sample in samples]


def shard_file(folder: Path) -> Path:
    return next(folder.rglob("t-000000.tar.*.shard"))


def index_file(folder: Path) -> Path:
    return Path(f"{shard_file(folder)}{INDEX_SUFFIX}")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)


def no_rows(path: Path) -> None:
    np.save(path, np.load(path)[:0])


def of_another_shard(path: Path) -> None:
    rows = np.load(path)
    rows["offset"][0] = rows["offset"][1]
    np.save(path, rows)


def a_link(path: Path) -> None:
    victim = path.parents[2] / "victim"
    victim.write_bytes(b"precious")
    path.unlink()
    path.symlink_to(victim)


def a_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "x").write_bytes(b"x")


def a_second_name(path: Path) -> None:
    """A hard link to somebody's file."""
    a_link(path)
    victim = path.readlink()
    path.unlink()
    os.link(victim, path)


PLANTED: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "a flipped bit": (shard_file, flip),
    "another file": (shard_file, lambda path: path.write_bytes(b"\0" * path.stat().st_size)),
    "an empty file": (shard_file, lambda path: path.write_bytes(b"")),
    "a link": (shard_file, a_link),
    "a link to nothing": (shard_file, a_link_to_nothing),
    "a fifo": (shard_file, a_fifo),
    "a folder": (shard_file, a_folder),
    "a second name": (shard_file, a_second_name),
    "an empty index": (index_file, lambda path: path.write_bytes(b"")),
    "an index that is none": (index_file, lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + b"x" * 500)),
    "an index without rows": (index_file, no_rows),
    "the index of another shard": (index_file, of_another_shard),
    "no index": (index_file, Path.unlink),
    "a linked index": (index_file, a_link),
    "a fifo for an index": (index_file, a_fifo),
    "a folder for an index": (index_file, a_folder),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_another_is_made_again(tmp_path, server, what):
    """It was read without a look: other pixels, an EOFError, or a wait without end."""
    folder = tmp_path / "cache"
    samples = everything(manifest_of(server, folder))
    place, plant = PLANTED[what]
    plant(place(folder))
    started = time.monotonic()
    assert everything(manifest_of(server, folder)) == samples
    assert everything(manifest_of(server, folder)) == samples
    assert time.monotonic() - started < 60  # and not without end
    assert server.gets["t-000000.tar"] == (2 if place is shard_file else 1)
    victim = tmp_path / "victim"
    assert not victim.exists() or victim.read_bytes() == b"precious"


@pytest.mark.parametrize("plant", [a_link, a_fifo, a_folder, a_second_name])
@pytest.mark.parametrize("name", ["t-000001.tar.lock", "room.lock"])
def test_a_planted_lock_empties_no_other_file(tmp_path, server, name, plant):
    """Its length is the room that is reserved, so whatever it led to was cut to nothing."""
    folder = tmp_path / "cache"
    samples = everything(manifest_of(server, folder))
    shutil.rmtree(folder)
    everything(manifest_of(server, folder))
    take_away(next(folder.rglob("t-000001.tar.*.shard")))
    plant(next(folder.rglob(name)))
    assert everything(manifest_of(server, folder)) == samples
    for victim in tmp_path.rglob("victim"):
        assert victim.read_bytes() == b"precious"


def test_the_cache_is_the_user_s_alone(tmp_path, server):
    folder = tmp_path / "some" / "cache"
    everything(manifest_of(server, folder))
    assert {
        stat.S_IMODE(path.stat().st_mode) for path in (folder.parent, folder, *folder.iterdir()) if path.is_dir()
    } == {0o700}
    shards = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in shards} == {0o600}


def test_each_file_is_compared_once_per_start(tmp_path, server, monkeypatch):
    """A shard of 500 MB takes half a second to compare; workers that are forked share what was found."""
    from swinv2_train.data.shards import shard_cache

    folder, read = tmp_path / "cache", []
    everything(manifest_of(server, folder))
    whole = shard_cache.is_whole
    monkeypatch.setattr(shard_cache, "is_whole", lambda *given: read.append(given) or whole(*given))
    manifest = manifest_of(server, folder)
    for _ in range(3):
        everything(manifest)
    assert len(read) == 2
    if os.fork() == 0:
        everything(manifest)
        os._exit(len(read))
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 2
    everything(pickle.loads(pickle.dumps(manifest)))  # another process is another start
    assert len(read) == 4


def test_an_endless_answer_is_cut_off(tmp_path, server):
    """A server could fill the disk with one shard, or with a manifest."""
    folder = tmp_path / "cache"
    manifest = manifest_of(server, folder)
    served = tmp_path / "served" / "t-000000.tar"
    served.write_bytes(served.read_bytes() + b"\0" * 2**22)
    with pytest.raises(ShardError, match="more than .* bytes came|bytes came, the manifest says"):
        everything(manifest)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2**20


def test_notes_are_kept_and_a_full_table_forgets(tmp_path):
    compared = Compared()
    for number in range(1000):
        compared.add(("path", number))
    assert sum(("path", number) in compared for number in range(1000)) > 950
    assert ("path", 1000) not in compared


def test_a_lock_file_that_comes_again_is_given_up(tmp_path):
    assert open_own(tmp_path / "nothing") is None
    os.close(open_lock_file(tmp_path / "lock"))
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o600
