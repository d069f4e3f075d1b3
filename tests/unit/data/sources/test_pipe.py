"""Pipes: every image of a good stream, and an error that names the command for anything less."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.data.loading.loader import TrainLoader
from swinv2_train.data.loading.pipe_loader import StreamLoader, build_train_loader
from swinv2_train.data.sample import SampleError, ShardError
from swinv2_train.data.shards.tar_reader import open_manifest
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.sources.pipe import Stream, open_stream, read_command
from tests.support.configs import composed, make_config
from tests.support.images import image_bytes
from tests.support.loaders import PixelsAndDraw
from tests.support.shard_files import samples, write_plain_tar

CONFIG = make_config(data={"num_workers": 0, "shuffle_buffer_images": 4, "max_bad_fraction": 0.5}).data


@pytest.fixture
def folder(tmp_path) -> Path:
    """t-000000.tar .. t-000003.tar with s0000 .. s0009."""
    write_shards(samples(10), str(tmp_path / "t"), 3)
    return tmp_path


def loader(pattern: str, rank: int = 0, world_size: int = 1, start: int = 0, config=CONFIG, seed: int = 0):
    return build_train_loader(
        open_stream(pattern), config, PixelsAndDraw(), seed, 4 * world_size, 4, rank, world_size, start
    )


def keys(pattern: str, batches: int = 5, **settings) -> list[str]:
    stream = loader(pattern, **settings)
    found = [key for batch in islice(stream, batches) for key in batch["keys"]]
    stream.close()
    return found


def gone(text: str) -> bool:
    """True when within 5 s no process of this machine has `text` in its command line any more."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if text not in subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout:
            return True
        time.sleep(0.05)
    return False


# --------------------------------------------------------------------------------------------------------------------
# One command


def test_a_command_gives_what_the_index_would(folder):
    """Images, labels, keys and order of an indexed shard, also behind a decompressor."""
    tar = folder / "t-000000.tar"
    subprocess.run(["gzip", "-k", str(tar)], check=True)
    for command in (f"cat {tar}", f"zcat {tar}.gz", f"cat {tar} | cat"):
        found = [
            (sample.key, sample.image, sample.extension, sample.targets.get("label"))
            for sample in read_command(command)
        ]
        assert found == samples(3), command


def test_headers_of_every_kind_pass(tmp_path):
    """Long names (GNU and PAX), members that are no files, a preferred extension, a key with a folder."""
    import tarfile

    members = [
        (f"{'long' * 40}/a.jpg", b"1"), (f"{'long' * 40}/a.cls", b"3"), ("__meta__/b.txt", b"no"),
        ("d/c.webp", b"2"), ("d/c.jpg", b"3"), ("e.png", b"x" * 30_000), ("e.cls", b"one"),
    ]  # fmt: skip
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_plain_tar(tmp_path / "t.tar", members, format=form)
        found = [
            (each.key, each.image, each.extension, each.targets.get("label")) for each in read_command(f"cat {path}")
        ]
        assert found == [
            (f"{'long' * 40}/a", b"1", "jpg", 3),
            ("d/c", b"3", "jpg", None),
            ("e", b"x" * 30_000, "png", None),
        ]


def damaged(folder: Path, kind: str) -> str:
    """A command whose output is damaged in the way that `kind` says."""
    content = bytearray((folder / "t-000000.tar").read_bytes())
    second = next(row for row in range(512, len(content), 512) if content[row : row + 8] == b"s0001.pn")
    if kind == "cut at a member":
        content = content[:second]
    elif kind == "cut in a member":
        content = content[: second + 600]
    elif kind == "corrupt header":
        content[second + 10] ^= 0xFF
    elif kind == "zeroed header":
        content[second : second + 512] = bytes(512)
    elif kind == "appended":
        content += (folder / "t-000001.tar").read_bytes()
    elif kind == "nothing":
        content = bytearray()
    elif kind == "no tar":
        content = bytearray(b"<html>not found</html>" * 100)
    path = folder / "damaged"
    path.write_bytes(content)
    return f"cat {path}"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut at a member", "cut off at byte 3072: there is no end mark"),
        ("cut in a member", "cut off at byte 3672: the member at byte 3072"),
        ("corrupt header", "damaged header at byte 3072"),
        ("zeroed header", "non-zero bytes at byte .*, after the end mark at 3072"),
        ("appended", "non-zero bytes"),
        ("nothing", r"empty \(0 bytes\)"),
        ("no tar", "not a tar file"),
    ],
)
def test_damage_is_an_error_that_names_the_command(kind, message, folder):
    """webdataset passes over four of these without a word; no half sample may be given out either."""
    command = damaged(folder, kind)
    found = []
    with pytest.raises(ShardError, match=rf"^pipe:{command}: {message}"):
        found.extend(read_command(command))
    assert [sample.key for sample in found] in ([], ["s0000"])  # s0001.cls has come, s0001.png has not
    with pytest.raises(ShardError, match=message):
        keys(f"pipe:{command}")


def test_the_same_key_twice_in_a_row_is_an_error(tmp_path):
    path = write_plain_tar(tmp_path / "t.tar", [("a.png", b"1"), ("a.png", b"2")])
    with pytest.raises(ShardError, match=r"^pipe:cat .*t.tar: a.png: duplicate"):
        list(read_command(f"cat {path}"))


def test_a_key_that_comes_again_after_others_is_an_error(tmp_path):
    """The index joins such members to one sample; a pipe made two of them, one without its label."""
    path = write_plain_tar(tmp_path / "t.tar", [("a.png", b"1"), ("b.png", b"2"), ("b.cls", b"1"), ("a.cls", b"0")])
    assert open_manifest(str(path)).counts == (2,)
    with pytest.raises(ShardError, match=r"^pipe:cat .*t.tar: the key 'a' comes again after others"):
        list(read_command(f"cat {path}"))


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("exit 7", "exit status 7, after [1-9][0-9]* bytes"),
        ("kill -9 $$", "signal 9"),
        ("nosuchcommand", "exit status 127"),
    ],
)
def test_a_command_that_fails_is_an_error_even_after_a_whole_shard(end, message, folder):
    """`cat shard; curl ...` may print all of one tar and fail: what it was to print more nobody knows."""
    command = f"cat {folder}/t-000000.tar; {end}"
    with pytest.raises(ShardError, match=rf"t-000000.tar; .*: the command failed \({message}"):
        list(read_command(command))


def test_a_command_that_fails_before_its_end_is_told_before_the_cut(folder):
    command = f"head -c 2600 {folder}/t-000000.tar; exit 22"
    with pytest.raises(ShardError, match=r"the command failed \(exit status 22, after 2600 bytes\)"):
        list(read_command(command))


def test_no_command_outlives_its_reader(folder, tmp_path):
    """A command that has more to print, and one that prints nothing any more, with what they started."""
    mark = str(10**6 + os.getpid())
    for command in (f"cat {folder}/t-000000.tar; sleep {mark}; true", f"yes {mark}; true"):
        reader = read_command(command)
        if command.startswith("cat"):
            next(reader)
        else:
            with pytest.raises(ShardError, match="not a tar"):
                next(reader)
        reader.close()
        assert gone(mark), command


def test_ctrl_c_does_not_cut_a_command_off(folder):
    """The terminal sends SIGINT to everybody; the training process stops after its step, so its data must flow on."""
    command = f"kill -INT $$; kill -TERM $$; kill -USR1 $$; cat {folder}/t-000000.tar"
    assert [sample.key for sample in read_command(command)] == ["s0000", "s0001", "s0002"]


# --------------------------------------------------------------------------------------------------------------------
# The loader


def test_commands_are_split_over_ranks_and_repeated(folder):
    """Every rank has its own shards, again and again in another order; all ranks together have all."""
    pattern = f"pipe:cat {folder}/t-{{000000..000003}}.tar"
    found = [Counter(keys(pattern, 15, rank=rank, world_size=2)) for rank in range(2)]  # 60 images
    assert found[0].keys() == {"s0000", "s0001", "s0002", "s0006", "s0007", "s0008"}
    assert found[1].keys() == {"s0003", "s0004", "s0005", "s0009"}
    assert min(found[0].values()) >= 9 and max(found[0].values()) <= 11  # 10 passes, the buffer holds 4
    order = keys(pattern, 15, rank=0, world_size=2, config=replace(CONFIG, shuffle_buffer_images=1))
    passes = [tuple(order[first : first + 6]) for first in range(0, 60, 6)]
    assert len(set(passes)) == 2, "two shards have two orders, and without a buffer there are no others"


def test_images_follow_from_seed_and_start(folder):
    pattern = f"pipe:cat {folder}/t-{{000000..000003}}.tar"
    first = keys(pattern)
    random.seed(5)
    assert keys(pattern) == first
    assert keys(pattern, start=20) != first, "a resume must not begin with the same images again"
    assert keys(pattern, seed=1) != first


def test_workers_share_the_commands(folder):
    """Four workers, three commands: each one has its own, all images come; the batches are whole."""
    pattern = f"pipe:cat {folder}/t-{{000000..000002}}.tar"
    config = replace(CONFIG, num_workers=4)
    stream = loader(pattern, config=config)
    batches = list(islice(stream, 12))
    assert all(batch["image"].shape == (4, 3, 8, 8) and len(batch["keys"]) == 4 for batch in batches)
    assert {key for batch in batches for key in batch["keys"]} == {f"s{i:04d}" for i in range(9)}
    assert {len(set(batch["keys"])) for batch in batches} <= {2, 3}, "a batch is one worker's, a worker has 3 images"
    again = loader(pattern, config=config)
    assert [batch["keys"] for batch in islice(again, 12)] == [batch["keys"] for batch in batches]
    for each in (stream, again):
        each.close()
    assert gone(str(folder)), "they notice when they write"


def test_rows_are_those_of_the_indexed_loader(folder):
    """The same decoding and transform; the random numbers alone are others."""

    def rows(batches) -> dict[str, tuple[bytes, int]]:
        return {
            key: (image.numpy().tobytes(), int(label))
            for batch in batches
            for key, image, label in zip(batch["keys"], batch["image"], batch["label"], strict=True)
        }

    indexed = TrainLoader(open_manifest(f"{folder}/t-*.tar"), CONFIG, PixelsAndDraw(), 0, 4, 4, 0, 1, 0)
    stream = loader(f"pipe:cat {folder}/t-{{000000..000003}}.tar")
    batches = list(islice(stream, 8))
    assert rows(batches) == rows(islice(indexed, 3)) and len(rows(batches)) == 10
    draws = [float(draw) for batch in batches for draw in batch["draw"]]
    assert len(set(draws)) == len(draws)
    indexed.close()
    stream.close()


def test_a_rank_without_a_command_is_an_error(folder):
    with pytest.raises(ConfigError, match=r"names 1 commands for 2 processes.*pipe:cat \{00..11\}.tar"):
        loader(f"pipe:cat {folder}/t-000000.tar", rank=1, world_size=2)


def test_patterns(folder):
    assert open_stream("pipe:cat {00..02}.tar::pipe: zcat x.gz") == Stream(
        ("cat 00.tar", "cat 01.tar", "cat 02.tar", "zcat x.gz")
    )
    for pattern, message in (
        (f"pipe:cat a.tar::{folder}/t-000000.tar", "no pipe, but other parts are"),
        ("pipe: ", "an empty pipe"),
    ):
        with pytest.raises(ShardError, match=f"data.shards '.*': {message}"):
            open_stream(pattern)
    with pytest.raises(ShardError, match="data.eval_shards 'pipe:cat a.tar': .*data.shards alone may be a pipe"):
        open_manifest("pipe:cat a.tar", "data.eval_shards")


def bad_shard(folder: Path) -> str:
    """Two good images, one that is none, one of 0 bytes, one without image, one without label."""
    members = [("a.png", image_bytes(1)), ("a.cls", b"1"), ("b.png", image_bytes(2)), ("b.cls", b"2")]
    members += [("c.png", b"no image"), ("c.cls", b"1"), ("d.png", b""), ("d.cls", b"1"), ("e.cls", b"1")]
    members += [("f.png", image_bytes(3)), ("f.cls", b"-1")]
    return f"pipe:cat {write_plain_tar(folder / 'bad.tar', members)}"


def test_a_damaged_sample_stops_or_is_replaced(tmp_path):
    pattern = bad_shard(tmp_path)
    with pytest.raises(SampleError, match=r"^pipe:cat .*bad.tar: sample '[cdef]': .*data.on_bad_sample=replace"):
        keys(pattern)
    stream = loader(pattern, config=replace(CONFIG, on_bad_sample="replace", max_bad_fraction=1.0))
    batches = list(islice(stream, 9))
    stream.close()
    causes = {problem["key"]: problem["cause"] for batch in batches for problem in batch["problems"]}
    assert causes.keys() == {"c", "d", "e", "f"}
    for key, cause in (
        ("c", "no known format"),
        ("d", "an empty image"),
        ("e", "no image"),
        ("f", "no readable label"),
    ):
        assert cause in causes[key]
    for batch in batches:
        weights = dict(zip(batch["keys"], batch["weight"].tolist(), strict=True))
        assert all(weight == float(key in "ab") for key, weight in weights.items())
        assert batch["num_bad"] == len(batch["problems"]) == weights_of(batch, 0.0) and len(batch["image"]) == 4


def weights_of(batch, value: float) -> int:
    return int((batch["weight"] == value).sum())


def test_too_many_damaged_samples_end_the_run(tmp_path):
    """0.5 of the first 10,000 images, then of all; damage before this start counts."""
    stream = loader(bad_shard(tmp_path), config=replace(CONFIG, on_bad_sample="replace"))
    stream.check_bad_images(5000, 6000)
    stream.check_bad_images(10_000, 20_000)
    for bad, seen in ((5001, 6000), (10_001, 20_000)):
        with pytest.raises(SampleError, match=rf"data.max_bad_fraction \(0.5\) is exceeded: {bad} damaged"):
            stream.check_bad_images(bad, seen)
    stream.check_state(stream.state_dict(6000, 4999))
    with pytest.raises(SampleError, match="is exceeded"):
        list(islice(stream, 4))
    stream.close()


def test_nothing_readable_at_all_is_an_error(tmp_path):
    path = write_plain_tar(tmp_path / "t.tar", [(f"{i}.png", b"no") for i in range(9)])
    with pytest.raises(ShardError, match="none of its first 4 samples is readable"):
        keys(f"pipe:cat {path}", config=replace(CONFIG, on_bad_sample="replace"))
    empty = write_plain_tar(tmp_path / "empty.tar", [])
    with pytest.warns(UserWarning, match="holds no samples"), pytest.raises(ShardError, match="print no sample"):
        keys(f"pipe:cat {empty}")


def test_a_checkpoint_of_the_one_kind_is_refused_by_the_other(folder):
    stream = loader(f"pipe:cat {folder}/t-000000.tar")
    indexed = TrainLoader(open_manifest(f"{folder}/t-*.tar"), CONFIG, PixelsAndDraw(), 0, 4, 4, 0, 1, 0)
    with pytest.raises(ConfigError, match="data.shards is a pipe, but the checkpoint's run reads indexed shards"):
        stream.check_state(indexed.state_dict(8, 0))
    with pytest.raises(ConfigError, match="data.shards are not the shards of the checkpoint"):
        indexed.check_state(stream.state_dict(8, 0))
    stream.check_state(loader(f"pipe:cat {folder}/t-000001.tar").state_dict(8, 3))
    assert stream.bad_images_before == 3


def test_the_loader_can_go_back(folder):
    stream = loader(f"pipe:cat {folder}/t-{{000000..000003}}.tar")
    next(iter(stream))
    again = stream.restarted(20)
    assert isinstance(again, StreamLoader)
    assert [key for batch in islice(again, 5) for key in batch["keys"]] == keys(
        f"pipe:cat {folder}/t-{{000000..000003}}.tar", start=20
    )
    again.close()
    assert gone(str(folder))


# --------------------------------------------------------------------------------------------------------------------
# The configuration


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.max_steps=null",), "train.epochs has no length where data.shards is a pipe .*; set train.max_steps"),
        (
            ("optim.schedule.warmup_steps=null",),
            "optim.schedule.warmup_epochs has no length where data.shards is a pipe",
        ),
        (("data.shuffle_buffer_images=0",), r"data.shuffle_buffer_images \(0\) must be at least 1"),
    ],
)
def test_lengths_are_given_in_steps(overrides, message):
    given = ["run_dir=run", "data.shards='pipe:cat {00..11}.tar'", "train.max_steps=9", "optim.schedule.warmup_steps=1"]
    config = composed(given)
    assert config.data.shards == "pipe:cat {00..11}.tar" and config.train.epochs is not None
    with pytest.raises(ConfigError, match=message):
        composed([*given, *overrides])


def test_a_stop_while_the_command_is_started_ends_it(monkeypatch):
    """Its handler runs in the main thread, which waits for the start."""

    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        time.sleep(0.2)
        return started[0]

    popen, started = subprocess.Popen, []
    monkeypatch.setattr(subprocess, "Popen", start)
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(Stop):
            next(read_command("sleep 1000"))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert started[0].returncode == -signal.SIGKILL
