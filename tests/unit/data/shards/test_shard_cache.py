"""The cache of remote shards: bounded, shared by processes, unharmed by kill -9, and never in the way of the order."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.data.loading.loader import EvalLoader, TrainLoader
from swinv2_train.data.loading.order import GlobalOrder, rank_batch, rank_shards
from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards import shard_cache as shard_cache_module
from swinv2_train.data.shards.prefetch import ShardPrefetcher
from swinv2_train.data.shards.shard_cache import ShardCache, shard_cache, shard_cache_for
from swinv2_train.data.shards.tar_reader import Manifest, TarReader, open_manifest
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.shards.transfers import RetryPolicy
from tests.support import loaders
from tests.support.configs import make_config
from tests.support.images import image_bytes
from tests.support.loaders import PixelsAndDraw
from tests.support.processes import forked_code
from tests.support.shard_server import ShardServer, serve

PATIENT = RetryPolicy(stall_sec=5.0, give_up_sec=20.0)
CONFIG = make_config(
    data={"lanes": 2, "window_shards": 2, "num_workers": 0, "fetch_ahead_shards": 2, "cache_gib": 1.0}
).data


@pytest.fixture
def server(tmp_path) -> Iterator[ShardServer]:
    """12 shards of 4 samples, about 30 kB each."""
    write_shards(
        [(f"k{i:03d}", image_bytes(i, size=(40, 40)), "png", None) for i in range(48)],
        str(tmp_path / "served" / "t"),
        4,
    )
    with serve(tmp_path / "served") as running:
        yield running


def remote(server: ShardServer, folder: Path, max_bytes: int = 2**30, patience: RetryPolicy = PATIENT) -> Manifest:
    pattern = f"{server.url}/t-{{000000..000011}}.tar"
    return open_manifest(pattern, cache=ShardCache(str(folder), max_bytes, patience))


def fetched(server: ShardServer) -> dict[str, int]:
    return {name: count for name, count in server.gets.items() if name.endswith(".tar")}


def cached(folder: Path) -> list[int]:
    return sorted(int(path.name.split(".")[0][2:]) for path in folder.rglob("*.shard"))


def used(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() and path.suffix != ".lock" else 0
        except FileNotFoundError:
            continue
    return total


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The most bytes that the folder held meanwhile."""
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], used(folder))
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


# --------------------------------------------------------------------------------------------------------------------
# The bound


def test_the_cache_keeps_its_bound_and_lets_the_least_recently_used_go(tmp_path, server):
    size = max(remote(server, tmp_path / "x").sizes)
    manifest = remote(server, tmp_path / "cache", 4 * size + 12_000)  # four, and their indices and the manifest
    with watched(tmp_path / "cache") as most:
        for shard in (0, 1, 2, 3, 0, 4, 5):
            reader = TarReader(manifest, max_open=1)
            reader.read(shard, 0)
            reader.close()
    assert cached(tmp_path / "cache") == [0, 3, 4, 5]
    assert 4 * 0.9 * size < most[0] <= 4 * size + 12_000
    assert server.gets["t-000000.tar"] == 1


def test_a_cached_shard_is_compared_with_its_checksum_when_that_is_asked_for(tmp_path, server):
    """A disk loses bits in the cache too; its index has no checksums, so the whole shard is compared when opened."""
    pattern, cache = f"{server.url}/t-000003.tar", ShardCache(str(tmp_path / "cache"), 2**30, PATIENT)
    manifest = open_manifest(pattern, cache=cache, verify=True)
    image = TarReader(manifest).read(0, 1).image
    assert TarReader(open_manifest(f"{tmp_path}/served/t-000003.tar")).read(0, 1).image == image
    (shard,) = (tmp_path / "cache").rglob("*.shard")
    data = bytearray(shard.read_bytes())
    data[data.index(image) + len(image) // 2] ^= 1
    shard.write_bytes(data)
    assert TarReader(replace(manifest, verify=False)).read(0, 1).image != image
    with pytest.raises(
        ShardError, match=r"\.shard: its checksum differs from the manifest; delete it, it is fetched again"
    ):
        TarReader(manifest).read(0, 0)


def test_a_shard_that_is_read_is_not_evicted(tmp_path, server):
    manifest = remote(server, tmp_path / "cache", 3 * 40_000)
    reader = TarReader(manifest, max_open=1)
    expected = reader.read(0, 0)
    other = TarReader(manifest, max_open=1)
    for shard in range(1, 8):
        other.read(shard, 0)
    assert 0 in cached(tmp_path / "cache") and reader.read(0, 1).key == "k001" and reader.read(0, 0) == expected
    reader.close()
    for shard in range(8, 12):
        other.read(shard, 0)
    assert 0 not in cached(tmp_path / "cache")


def test_no_room_is_an_error_that_names_the_keys_to_change(tmp_path, server):
    small = remote(server, tmp_path / "small", 20_000)
    with pytest.raises(ShardError, match=r"data.cache_gib .* is less than one shard: .*t-000000.tar"):
        TarReader(small).read(0, 0)
    manifest = remote(server, tmp_path / "cache", 2 * 40_000, RetryPolicy(1.0, 0.5))
    reader = TarReader(manifest)
    with pytest.raises(ShardError, match=r"t-000002.tar: no room .* all of data.cache_gib .* is in use; raise it, or"):
        for shard in range(3):
            reader.read(shard, 0)
    mixed = replace(CONFIG, lanes=4, window_shards=3)
    with pytest.raises(ConfigError, match=r"data.cache_gib .* is too small: rank 0 alone mixes 12 shards .*data.lanes"):
        train_loader(manifest, mixed)


def test_the_cache_is_the_data_sections(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = shard_cache(replace(CONFIG, cache_gib=0.5, fetch_stall_sec=7.0, fetch_give_up_sec=8.0))
    assert cache == ShardCache(f"{tmp_path}/swinv2_train/shards", 2**29, RetryPolicy(7.0, 8.0))
    assert shard_cache(replace(CONFIG, cache_dir="rel")).folder == f"{os.getcwd()}/rel"


def test_what_comes_in_slowly_says_how_far_it_is(tmp_path, server, monkeypatch):
    """To a start that indexes; and to the watchdog, for whom it is no hang."""
    monkeypatch.setattr(shard_cache_module, "TOLD_EVERY_SEC", 0.02)
    said: list[str] = []
    server.bytes_per_sec = 40_000
    cache = ShardCache(str(tmp_path / "cache"), 2**30, PATIENT)
    assert not cache.incoming()
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(cache.entries, [f"{server.url}/t-000000.tar"], (), said.append)
        (server.folder / "manifest.json").unlink()
        seen = set()
        while not fetching.done():
            seen.add(cache.incoming())
            time.sleep(0.05)
        fetching.result()
    assert len(seen) > 2 and not cache.incoming()
    told = [line for line in said if line.startswith("fetching ")]
    assert told and all(re.fullmatch(r"fetching t-000000.tar: 0\.0 MB so far", line) for line in told)


def test_what_is_on_its_way_is_one_line(tmp_path):
    """Of a shard with a manifest the lock file's length is the whole, and few of many are named."""
    place = tmp_path / "0123"
    place.mkdir()
    for number, (came, size) in enumerate([(120_000_000, 400_000_000), (2_500_000, 0), *[(1, 10**6)] * 5]):
        for name, length in ((f"t-{number}.tar.77-{number}.part", came), (f"t-{number}.tar.lock", size)):
            (place / name).touch()
            os.truncate(place / name, length)
    cache = ShardCache(str(tmp_path), 2**30, PATIENT)
    assert str(cache.incoming()) == (
        "fetching t-0.tar: 120.0 of 400.0 MB, t-1.tar: 2.5 MB so far, t-2.tar: 0.0 of 1.0 MB, t-3.tar: 0.0 of 1.0 MB "
        "and 3 more"
    )


def test_local_data_needs_no_cache_and_no_home(tmp_path, monkeypatch):
    """HOME unset and a user that the system does not know, as in many containers: Path.home() raised, for no need."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert shard_cache_for(f"{tmp_path}/t-*.tar", CONFIG) is None
    with pytest.raises(ShardError, match="HOME is not set.*set XDG_CACHE_HOME, or data.cache_dir"):
        shard_cache_for("https://host/t-0.tar", CONFIG)
    assert shard_cache_for("https://host/t-0.tar", replace(CONFIG, cache_dir=str(tmp_path))) is not None


# --------------------------------------------------------------------------------------------------------------------
# Processes


def _read_everything(arguments: tuple[Manifest, int]) -> list[bytes]:
    manifest, first = arguments
    reader = TarReader(manifest)
    count = len(manifest.counts)
    images = {shard: reader.read(shard, 3).image for shard in ((first + i) % count for i in range(count))}
    return [images[shard] for shard in range(count)]


def test_processes_that_share_a_cache_fetch_each_shard_once(tmp_path, server):
    """All ranks and workers of a host; also after this process, which forked them, has used the client itself."""
    server.bytes_per_sec = 500_000
    manifest = remote(server, tmp_path / "cache")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(_read_everything, [(manifest, first) for first in (0, 0, 5, 9)], chunksize=1)
    assert results == [[image_bytes(4 * shard + 3, size=(40, 40)) for shard in range(12)]] * 4
    assert fetched(server) == {f"t-{number:06d}.tar": 1 for number in range(12)}


def test_starts_at_one_moment_index_shards_without_a_manifest_once(tmp_path, server):
    """Whoever waited for another's fetch looks again, and does not fetch what is known by now."""
    (server.folder / "manifest.json").unlink()
    server.bytes_per_sec = 200_000  # so that both look before any is there
    cache = ShardCache(str(tmp_path / "cache"), 2**30, PATIENT)
    urls = [f"{server.url}/t-{number:06d}.tar" for number in range(4)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: cache.entries(urls), range(2))
    assert first == second and set(first) == set(urls)
    assert set(fetched(server).values()) == {1}


def test_processes_under_a_tight_bound_take_turns(tmp_path, server):
    """Room that one process gives up another one gets; nobody starves and the bound holds."""
    bound = 5 * 32_000
    manifest = remote(server, tmp_path / "cache", bound)
    with watched(tmp_path / "cache") as most, multiprocessing.get_context("fork").Pool(3) as pool:
        results = pool.map(_read_one_by_one, [(manifest, first) for first in (0, 4, 8)], chunksize=1)
    assert results == [[image_bytes(4 * shard, size=(40, 40)) for shard in range(12)]] * 3
    assert most[0] <= bound


def _read_one_by_one(arguments: tuple[Manifest, int]) -> list[bytes]:
    manifest, first = arguments
    reader = TarReader(manifest, max_open=1)
    images = {shard: reader.read(shard, 0).image for shard in ((first + i) % 12 for i in range(12))}
    return [images[shard] for shard in range(12)]


_READ_ONE = """
import sys
from swinv2_train.data.shards.shard_cache import ShardCache
from swinv2_train.data.shards.transfers import RetryPolicy
from swinv2_train.data.shards.tar_reader import TarReader, open_manifest
url, folder, then = sys.argv[1:]
manifest = open_manifest(url + "/t-{000000..000011}.tar", cache=ShardCache(folder, 100_000, RetryPolicy(30.0, 60.0)))
reader = TarReader(manifest)
if then == "ahead":
    reader.fetch_ahead([0, 1])
    import time
    time.sleep(1.5)
    sys.exit(3)
print(reader.read(0, 0).key, flush=True)
"""


def _reader_process(server: ShardServer, folder: Path, then: str = "read") -> subprocess.Popen[str]:
    return forked_code(_READ_ONE, server.url, str(folder), then, stdout=subprocess.PIPE)


def _wait_for(what, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_kill_9_in_mid_fetch_leaves_nothing_that_counts_and_the_next_process_cleans_up(tmp_path, server):
    folder = tmp_path / "cache"
    server.faults["t-000000.tar"] = ["stall", "stall"]
    process = _reader_process(server, folder)
    _wait_for(lambda: any(path.stat().st_size for path in folder.rglob("*.part")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cached(folder) == [] and len(list(folder.rglob("*.part"))) == 1
    reserved = [path.stat().st_size for path in folder.rglob("t-*.lock")]
    assert sum(reserved) > 20_000, "the room of the dead process is still reserved"

    other = TarReader(remote(server, folder, 100_000))  # needs that room for other shards
    for shard in (3, 4, 5):
        other.read(shard, 0)
        other.close()
    assert not list(folder.rglob("*.part")) and all(not path.stat().st_size for path in folder.rglob("t-*.lock"))

    process = _reader_process(server, folder)  # the same again
    _wait_for(lambda: any(path.stat().st_size for path in folder.rglob("*.part")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    restarted = _reader_process(server, folder)
    assert restarted.communicate(timeout=240)[0] == "k000\n"
    assert not list(folder.rglob("*.part"))


def test_a_process_that_waits_for_a_fetch_takes_over_when_the_other_one_is_killed(tmp_path, server):
    folder = tmp_path / "cache"
    server.faults["t-000000.tar"] = ["stall"]
    first = _reader_process(server, folder)
    _wait_for(lambda: any(path.stat().st_size for path in folder.rglob("*.part")))
    second = _reader_process(server, folder)
    _wait_for(lambda: server.heads["t-000000.tar"] == 2)
    first.kill()
    assert second.communicate(timeout=240)[0] == "k000\n"
    first.wait()


@pytest.mark.slow
def test_a_process_exits_while_it_fetches(tmp_path, server):
    """A rank that is done, or stops, must not wait for a transfer that stalls."""
    server.faults["t-000000.tar"] = server.faults["t-000001.tar"] = ["always stall"]
    process = _reader_process(server, tmp_path / "cache", "ahead")
    assert process.wait(timeout=240) == 3


# --------------------------------------------------------------------------------------------------------------------
# Fetching ahead, in the order's order


def train_loader(manifest: Manifest, config=CONFIG, **changes) -> TrainLoader:
    transform = PixelsAndDraw(needs_label=False)
    return loaders.train_loader(manifest, config, transform=transform, global_batch_size=8, **changes)


def stream(loader: TrainLoader, count: int) -> list[tuple[list[str], list[float]]]:
    found = [(batch["keys"], batch["draw"].tolist()) for batch in islice(loader, count)]
    loader.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_over_http_is_the_local_one_and_each_shard_comes_once_per_epoch(tmp_path, server, workers):
    """With every kind of fault on the way, and room for the windows twice and what is fetched ahead, no more."""
    local = stream(train_loader(open_manifest(f"{tmp_path}/served/t-*.tar")), 24)
    for number, fault in enumerate(["slow start", 500, "cut", "wrong", 503]):
        server.faults[f"t-{number:06d}.tar"] = [fault]
    bound = 10 * 31_100
    manifest = remote(server, tmp_path / "cache", bound)
    config = replace(CONFIG, num_workers=workers)
    with watched(tmp_path / "cache") as most:
        assert stream(train_loader(manifest, config), 12) == local[:12]  # one epoch
    assert most[0] <= bound
    attempts = {f"t-{number:06d}.tar": 1 + (number in (1, 2, 3, 4)) for number in range(12)}
    if workers == 0:
        assert fetched(server) == attempts
    else:  # two workers are up to a whole block apart, which is two batches, so that each may fetch all for itself; and
        # in so little room a shard that came ahead is now and then let go before it is read (1 run in 10)
        counts = fetched(server)
        assert counts.keys() == attempts.keys()
        assert all(attempts[name] <= count <= attempts[name] + 2 for name, count in counts.items()), counts
        assert sum(counts.values()) <= sum(attempts.values()) + len(counts), counts
    resumed = train_loader(manifest, config, start_images=48)
    assert stream(resumed, 12) == local[12:]


def test_two_ranks_of_a_host_share_what_they_fetch(tmp_path, server):
    local = [stream(train_loader(open_manifest(f"{tmp_path}/served/t-*.tar"), rank=r, world_size=2), 6) for r in (0, 1)]
    manifest = remote(server, tmp_path / "cache")
    loaders = [train_loader(manifest, replace(CONFIG, num_workers=1), rank=r, world_size=2) for r in (0, 1)]
    streams = [iter(loader) for loader in loaders]
    found: list[list] = [[], []]
    for _ in range(6):
        for rank in (0, 1):
            batch = next(streams[rank])
            found[rank].append((batch["keys"], batch["draw"].tolist()))
    for loader in loaders:
        loader.close()
    assert found == local and set(fetched(server).values()) == {1}


def test_shards_come_before_they_are_needed(tmp_path, server):
    """After the first batch the windows of the lanes and data.fetch_ahead_shards more are on their way, no others."""
    loader = train_loader(remote(server, tmp_path / "cache"))
    next(iter(loader))
    now, later = rank_shards(loader.order, 0, 8, 0, 1, 2)
    assert len(now) == 4 and len(later) == 2 and not set(now) & set(later)
    _wait_for(lambda: set(cached(tmp_path / "cache")) == {*now, *later})
    time.sleep(0.3)
    assert len(cached(tmp_path / "cache")) == 6
    loader.close()


@pytest.mark.slow
def test_a_shard_that_cannot_be_had_ends_the_run_once_its_turn_comes(tmp_path, server):
    """And not only after the reader has tried for the whole time limit again, as the thread ahead of it did."""
    manifest = remote(server, tmp_path / "cache", patience=RetryPolicy(0.5, 1.0))
    order = GlobalOrder(manifest.counts, 5, 2, 2)
    _, later = rank_shards(order, 0, 8, 0, 1, 2)
    server.faults[f"t-{later[0]:06d}.tar"] = ["always 500"]
    read, attempts = 0, 0
    with pytest.raises(ShardError, match=f"t-{later[0]:06d}.tar: cannot be fetched, .*HTTP 500"):
        for _ in train_loader(manifest):
            read += 1
            if read == 1:  # a step that takes longer than the time limit
                time.sleep(1.5)
                attempts = server.gets[f"t-{later[0]:06d}.tar"]
    assert read >= 3, "what came before it was still used"
    assert server.gets[f"t-{later[0]:06d}.tar"] == attempts > 1


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_reads_its_own_shards_in_order(tmp_path, server, workers):
    manifest = remote(server, tmp_path / "cache")
    config = replace(CONFIG, num_workers=workers, fetch_ahead_shards=1)
    loader = EvalLoader(manifest, config, PixelsAndDraw(needs_label=False), 5, 1, 3)
    keys = [key for batch in loader for key in batch["keys"]]
    loader.close()
    assert keys == [f"k{i:03d}" for i in range(16, 32)] + [""] * 4
    assert sorted(fetched(server)) == [f"t-{number:06d}.tar" for number in range(4, 8)]


@pytest.mark.slow
def test_the_shards_of_a_rank_are_those_it_reads_soonest_first():
    """Against brute force over the order, also over the epoch border and with batches that touch some lanes only."""
    for counts, lanes, window, batch, world in (
        ([5] * 30, 4, 2, 8, 2),
        ([3, 0, 9, 1] * 6, 3, 2, 6, 1),
        ([7] * 9, 8, 1, 4, 2),
    ):
        order = GlobalOrder(counts, 1, lanes, window)
        for start in (0, 3 * batch, order.num_samples - order.num_samples % batch):
            for rank in range(world):
                now, later = rank_shards(order, start, batch, rank, world, 1000)
                steps = -(-lanes // batch)
                reads = [
                    [loc[1] for loc in rank_batch(order, start + i * batch, batch, rank, world)]
                    for i in range(order.num_samples // batch)
                ]
                steps = -(-lanes // batch)
                assert {shard for shards in reads[:steps] for shard in shards} <= set(now)
                if lanes % world == 0 and (batch % lanes == 0 or lanes % batch == 0):  # lanes do not change hands
                    first_need: dict[int, int] = {}
                    for step, shards in enumerate(reads):
                        for shard in shards:
                            first_need.setdefault(shard, step)
                    assert first_need.keys() <= {*now, *later}
                few = rank_shards(order, start, batch, rank, world, 3)[1]
                assert len(few) <= 3 and set(few) <= set(later) and few[:2] == later[:2]
    uneven = GlobalOrder([4] * 6 + [1] * 8, 0, 2, 1)  # 16 samples a lane, one shard at a time
    for start in range(0, 32, 2):
        reads = [uneven.locate(position)[:2] for position in range(start, start + 64)]
        now, later = rank_shards(uneven, start, 2, 0, 1, 1)
        following = [shard for i, (_, shard) in enumerate(reads) if shard not in {s for _, s in reads[:i]} and i > 1]
        assert set(now) == {shard for _, shard in reads[:2]}
        assert later[0] in following[:2]  # the sooner one; where both begin alike, either


def test_fetching_ahead_brings_each_shard_once_and_makes_room_for_the_next_ones(tmp_path, server):
    manifest = remote(server, tmp_path / "cache", 4 * 32_000)
    shards = [manifest.remote(number) for number in range(12)]
    ahead = ShardPrefetcher(manifest.cache)
    for first in (0, 3, 6):
        ahead.request(shards[first : first + 3])
        _wait_for(lambda first=first: set(cached(tmp_path / "cache")) >= set(range(first, first + 3)))
    ahead.request(shards)  # more than there is room for: no shard is fetched over and over
    _wait_for(lambda: sum(fetched(server).values()) >= 15)
    time.sleep(1.2)
    assert sum(fetched(server).values()) <= 9 + 12
    ahead.close()
    _wait_for(lambda: not any(thread.is_alive() for thread in ahead._threads))
