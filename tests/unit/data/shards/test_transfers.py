"""Shards at an address: every fault of a real server is survived or is one clear error, and the bytes are right."""

from __future__ import annotations

import json
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from swinv2_train.config import ConfigError
from swinv2_train.config.command_line import guarded
from swinv2_train.data.sample import ShardError, ShardOutageError
from swinv2_train.data.shards.answers import MismatchError
from swinv2_train.data.shards.shard_cache import ShardCache
from swinv2_train.data.shards.tar_reader import Manifest, TarReader, open_manifest
from swinv2_train.data.shards.tar_writer import write_shards
from swinv2_train.data.shards.transfers import (
    RetryPolicy,
    base_name,
    folder_of,
    redacted,
    retry,
    sibling_url,
)
from swinv2_train.distributed import on_main, raise_together
from tests.support.images import image_bytes
from tests.support.shard_files import samples, write_plain_tar
from tests.support.shard_server import serve

pytestmark = pytest.mark.slow

PATIENT = RetryPolicy(stall_sec=0.4, give_up_sec=20.0)
HASTY = RetryPolicy(stall_sec=0.4, give_up_sec=1.0)
SHARDS = "t-{000000..000003}.tar"


@pytest.fixture
def server(tmp_path):
    """Four shards of 10 samples in all, with their manifest."""
    write_shards(samples(10), str(tmp_path / "served" / "t"), 3)
    with serve(tmp_path / "served") as running:
        yield running


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The shards as s3://bucket/a/t-*.tar."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()  # it knows the last test's server
    write_shards(samples(10), str(tmp_path / "served" / "bucket" / "a" / "t"), 3)
    with serve(tmp_path / "served") as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield running


def cache_in(folder: Path, patience: RetryPolicy = PATIENT, max_bytes: int = 10**9) -> ShardCache:
    return ShardCache(str(folder), max_bytes, patience)


def read_all(manifest: Manifest) -> list[tuple[str, bytes, str, int | None]]:
    reader = TarReader(manifest)
    places = [(shard, i) for shard, count in enumerate(manifest.counts) for i in range(count)]
    found = [reader.read(*place) for place in places]
    reader.close()
    return [(sample.key, sample.image, sample.extension, sample.targets.get("label")) for sample in found]


def test_shards_of_an_address_are_those_of_the_folder_behind_it(tmp_path, server):
    """The digest too, so that a run may go on where its shards moved to."""
    manifest = open_manifest(f"{server.url}/{SHARDS}", cache=cache_in(tmp_path / "cache"))
    assert manifest.digest == open_manifest(f"{tmp_path}/served/t-*.tar").digest
    assert server.gets == {"manifest.json": 1, "classes.txt": 1}, "with a manifest no shard is fetched at the start"
    assert read_all(manifest) == samples(10)
    assert read_all(manifest) == samples(10)
    assert all(server.gets[f"t-00000{number}.tar"] == 1 for number in range(4)), "fetched once, then kept"


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "stall", "slow start", "wrong"])
def test_a_fault_that_passes_is_survived(tmp_path, server, fault):
    server.faults["t-000002.tar"] = [fault]
    server.faults["manifest.json"] = [] if fault == "wrong" else [fault]  # its own checksum is nowhere
    cache = cache_in(tmp_path / "cache", RetryPolicy(stall_sec=1.0, give_up_sec=20.0))
    assert read_all(open_manifest(f"{server.url}/{SHARDS}", cache=cache)) == samples(10)
    assert server.gets["t-000002.tar"] == (1 if fault == "slow start" else 2)
    assert not server.faults["t-000002.tar"] and not server.faults["manifest.json"]


@pytest.mark.parametrize(
    ("fault", "patience", "message"),
    [
        ("always 500", HASTY, r"\d attempts in \d+ s, the last ended with: HTTP 500 .*fetch_give_up_sec"),
        ("always cut", HASTY, r"\d attempts in \d+ s, the last ended with: ClientPayloadError.*fetch_give_up_sec"),
        ("always stall", HASTY, r"\d attempts in \d+ s, the last ended with: TimeoutError: no byte came"),
        ("always wrong", PATIENT, r"3 attempts in \d+ s, the last ended with: MismatchError.* another checksum"),
        ("always 404", PATIENT, r"1 attempt in \d+ s, the last ended with: FileNotFoundError.*check the address"),
        ("always 403", PATIENT, r"1 attempt in \d+ s, the last ended with: HTTP 403 .*your access"),
    ],
)
def test_a_fault_that_stays_is_one_error_with_address_attempts_and_cause(tmp_path, server, fault, patience, message):
    """What retrying cannot fix is not retried; the rest ends after data.fetch_give_up_sec."""
    server.faults["t-000002.tar"] = [fault]
    manifest = open_manifest(f"{server.url}/{SHARDS}?signature=secret", cache=cache_in(tmp_path / "cache", patience))
    with pytest.raises(
        ShardError, match=f"^{re.escape(server.url)}/t-000002.tar: cannot be fetched, {message}"
    ) as caught:
        read_all(manifest)
    assert "secret" not in str(caught.value)
    left = {path.suffix for path in (tmp_path / "cache").rglob("*0002*")}
    assert left == {".lock"} and all(not path.stat().st_size for path in (tmp_path / "cache").rglob("*.lock"))


def test_a_missing_shard_and_one_of_another_size_are_errors_at_the_start(tmp_path, server):
    cache = cache_in(tmp_path / "cache")
    with pytest.raises(ShardError, match=rf"^{server.url}/t-000004.tar does not exist"):
        open_manifest(f"{server.url}/t-{{000000..000004}}.tar", cache=cache)
    path = tmp_path / "served" / "t-000001.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ShardError, match=f"t-000001.tar: {size - 512} bytes, manifest says {size}; .*index it anew"):
        open_manifest(f"{server.url}/{SHARDS}", cache=cache)


def test_without_a_manifest_every_shard_is_indexed_once_and_remembered(tmp_path, server):
    (tmp_path / "served" / "manifest.json").unlink()
    said: list[str] = []
    first = open_manifest(f"{server.url}/{SHARDS}", progress=said.append, cache=cache_in(tmp_path / "cache"))
    assert "4 shards have no manifest; each is fetched once to be indexed" in said[0] and len(said) == 5
    assert read_all(first) == samples(10)
    assert sum(server.gets[f"t-00000{n}.tar"] for n in range(4)) == 4
    assert open_manifest(f"{server.url}/{SHARDS}", cache=cache_in(tmp_path / "cache")) == first
    assert sum(server.gets[f"t-00000{n}.tar"] for n in range(4)) == 4, "what was indexed is remembered"


def test_a_damaged_shard_without_a_manifest_is_an_error_that_names_its_address(tmp_path, server):
    (tmp_path / "served" / "manifest.json").unlink()
    path = tmp_path / "served" / "t-000001.tar"
    path.write_bytes(path.read_bytes()[:1536])
    with pytest.raises(ShardError, match=rf"^{server.url}/t-000001.tar: cut off at byte 1536"):
        open_manifest(f"{server.url}/{SHARDS}", cache=cache_in(tmp_path / "cache"))


def test_a_manifest_that_says_otherwise_makes_cached_bytes_worthless(tmp_path, server):
    """Somebody wrote the shards anew: the old copies in the cache must not be mixed with the new manifest."""
    cache = cache_in(tmp_path / "cache")
    read_all(open_manifest(f"{server.url}/{SHARDS}", cache=cache))
    for path in (tmp_path / "served").glob("t-*"):
        path.unlink()
    fresh = [(key, image_bytes(i + 100), kind, label) for i, (key, _, kind, label) in enumerate(samples(10))]
    write_shards(fresh, str(tmp_path / "served" / "t"), 3)
    assert read_all(open_manifest(f"{server.url}/{SHARDS}", cache=cache)) == fresh


def test_wildcards_need_a_server_that_lists(tmp_path, server):
    cache = cache_in(tmp_path / "cache")
    manifest = open_manifest(f"{server.url}/t-*.tar", cache=cache)
    assert manifest == open_manifest(f"{server.url}/{SHARDS}", cache=cache)
    server.lists = False
    with pytest.raises(ShardError, match=r"t-\*.tar' matches nothing; .*name them by braces"):
        open_manifest(f"{server.url}/t-*.tar", cache=cache)


@pytest.mark.parametrize("listed", ["beside them", "in the cache"])
def test_a_wildcard_that_misses_a_shard_is_an_error(listed, tmp_path, server):
    """A shard that was deleted or renamed on the server: training on the rest would be another data set in silence."""
    cache, served = cache_in(tmp_path / "cache"), tmp_path / "served"
    where = f"{server.url}/manifest.json"
    if listed == "in the cache":
        (served / "manifest.json").unlink()
        where = f"{tmp_path}/cache/.*/manifest.json"
    open_manifest(f"{server.url}/t-*.tar", cache=cache)
    (served / "t-000001.tar").rename(served / "x-000001.tar")
    (served / "t-000003.tar").unlink()
    message = rf"^{server.url}/t-000001.tar is missing, {where} lists it \(2 such shards\); put it there"
    with pytest.raises(ShardError, match=message):
        open_manifest(f"{server.url}/t-*.tar", cache=cache)
    for pattern in ("t-*0.tar", "t-*[02].tar", "t-{000000,000002}.tar"):
        assert open_manifest(f"{server.url}/{pattern}", cache=cache).num_samples > 0, "it asks for none that is gone"


def test_a_bucket_that_misses_a_shard_is_an_error_in_its_own_folder(tmp_path, bucket):
    served = tmp_path / "served" / "bucket"
    write_shards(samples(4), str(served / "b" / "t"), 2)
    cache = cache_in(tmp_path / "cache")
    assert open_manifest("s3://bucket/{a,b}/t-*.tar", cache=cache).num_samples == 14
    (served / "b" / "t-000001.tar").unlink()
    for pattern in ("s3://bucket/{a,b}/t-*.tar", "s3a://bucket/b/t-*.tar"):
        with pytest.raises(ShardError, match=r"^s3://bucket/b/t-000001.tar is missing, s3://bucket/b/manifest.json"):
            open_manifest(pattern, cache=cache)
    assert open_manifest("s3://bucket/a/t-*.tar::s3://bucket/b/*0.tar", cache=cache).num_samples == 12


def test_local_and_remote_shards_mix(tmp_path, server):
    local = write_plain_tar(tmp_path / "l.tar", [("x.png", image_bytes(50))])
    manifest = open_manifest(f"{local}::{server.url}/t-000003.tar", cache=cache_in(tmp_path / "cache"))
    assert [key for key, *_ in read_all(manifest)] == ["x", "s0009"]


@pytest.mark.parametrize("pattern", ["t-{000000..000003}.tar", "t-*.tar"])
def test_s3(tmp_path, bucket, pattern):
    manifest = open_manifest(f"s3://bucket/a/{pattern}", cache=cache_in(tmp_path / "cache"))
    assert manifest.digest == open_manifest(f"{tmp_path}/served/bucket/a/t-*.tar").digest
    bucket.faults["t-000000.tar"], bucket.faults["t-000001.tar"] = [503, "cut"], ["stall", "wrong"]
    assert read_all(manifest) == samples(10)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("always 404", "1 attempt .*it is not there"),
        ("always 403", "1 attempt .*the server forbids it"),
    ],
)
def test_s3_errors_are_told_alike(tmp_path, bucket, fault, message):
    bucket.faults["t-000002.tar"] = [fault]
    manifest = open_manifest(f"s3://bucket/a/{SHARDS}", cache=cache_in(tmp_path / "cache"))
    with pytest.raises(ShardError, match=f"^s3://bucket/a/t-000002.tar: cannot be fetched, {message}"):
        read_all(manifest)
    with pytest.raises(ShardError, match=r"^s3://bucket/a/t-000004.tar does not exist"):
        open_manifest("s3://bucket/a/t-{000000..000004}.tar", cache=cache_in(tmp_path / "cache"))


def test_an_address_that_nobody_can_read_is_one_error(tmp_path):
    for pattern, message in (("nosuch://x/t.tar", "nosuch"), ("http://127.0.0.1:9/t.tar", "cannot be fetched")):
        with pytest.raises(ShardError, match=message):
            open_manifest(pattern, cache=cache_in(tmp_path / "cache", RetryPolicy(0.4, 0.5)))
    with pytest.raises(ShardError, match="data.shards alone may be a pipe"):
        open_manifest("pipe:cat t.tar", cache=cache_in(tmp_path / "cache"))


def test_pauses_grow_and_the_global_generator_is_left_alone(monkeypatch):
    """The clock stands still but for the pauses: 0.5 s doubling up to 60 s, each shortened by up to a half."""
    now, pauses = [0.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    before = random.getstate()
    with pytest.raises(ShardError, match="x: cannot be fetched, .* in [56]\\d\\d s, .*OSError: no"):
        retry("x", lambda: (_ for _ in ()).throw(OSError("no")), RetryPolicy(1.0, 600.0))
    assert random.getstate() == before
    longest = [min(0.5 * 2**attempt, 60.0) for attempt in range(len(pauses))]
    assert all(limit / 2 <= pause <= limit for pause, limit in zip(pauses, longest, strict=True)) and len(pauses) > 10
    assert len(set(pauses[8:])) > 1, "ranks that fail together must not come back together"


def test_addresses_are_shown_without_secrets():
    url = "https://me:pass@host/a/t.tar?X-Amz-Signature=abc"
    assert redacted(url) == "https://host/a/t.tar" and redacted("/data/what?.tar") == "/data/what?.tar"
    assert base_name(url) == "t.tar" and folder_of(url) == "https://me:pass@host/a/"
    assert sibling_url(url, "manifest.json") == "https://me:pass@host/a/manifest.json?X-Amz-Signature=abc"


def test_the_index_beside_a_manifest_is_of_the_same_version(tmp_path, server):
    """A manifest that is none is said so, with its address."""
    (tmp_path / "served" / "manifest.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(ShardError, match=rf"^{server.url}/manifest.json is not a manifest of version 1"):
        open_manifest(f"{server.url}/{SHARDS}", cache=cache_in(tmp_path / "cache"))


def test_a_cache_folder_that_cannot_be_used_is_named(tmp_path, server):
    (tmp_path / "file").write_text("x")
    message = r"data.cache_dir \(.*/file\) cannot be used: .*name a folder of a local disk"
    with pytest.raises(ShardError, match=message):
        open_manifest(f"{server.url}/{SHARDS}", cache=cache_in(tmp_path / "file"))
    manifest = open_manifest(f"{server.url}/{SHARDS}", cache=cache_in(tmp_path / "cache"))
    with pytest.raises(ShardError, match=message):  # on another host
        read_all(replace(manifest, cache=cache_in(tmp_path / "file")))


# --------------------------------------------------------------------------------------------------------------------
# What the server said decides, from the first request on


@pytest.mark.parametrize("absent", [403, 401, 404, 410, 405, 400, "page"])
def test_a_bucket_that_forbids_what_is_not_there_has_no_manifest(tmp_path, server, absent):
    """An https bucket says 403 for a name that is not there to who may not list; others answer with a page."""
    (tmp_path / "served" / "manifest.json").unlink()
    server.absent, said = absent, []
    manifest = open_manifest(f"{server.url}/{SHARDS}?sig=secret", progress=said.append, cache=cache_in(tmp_path / "c"))
    assert read_all(manifest) == samples(10) and manifest.classes is None
    told = [line for line in said if "manifest.json: the server answers" in line]
    assert len(told) == (0 if absent in (404, 410) else 1) and "secret" not in " ".join(said)


BUSY, ENDED = (500, 503, 429, (503, {"Retry-After": "1"})), ("cut", "stall", "unannounced")


@pytest.mark.parametrize(
    ("file", "fault"),
    [(file, fault) for file in ("manifest.json", "t-000001.tar") for fault in (*BUSY, *ENDED)]
    + [(question, fault) for question in ("heads", "listing") for fault in BUSY],
)
def test_every_request_is_tried_again_from_the_first_one_on(tmp_path, server, file, fault):
    """docs/data.md promises it of each: the manifest, the sizes, the listing of a wildcard, the shards."""
    if file == "heads":
        server.head_faults["t-000001.tar"] = [fault]
        server.faults["t-000001.tar"] = [fault]  # its size is asked for by GET then
    elif file == "listing":
        server.listing_faults = [fault]
    else:
        server.faults[file] = [fault]
    pattern = "t-*.tar" if file == "listing" else SHARDS
    cache = cache_in(tmp_path / "cache", RetryPolicy(stall_sec=0.5, give_up_sec=20.0))
    assert read_all(open_manifest(f"{server.url}/{pattern}", cache=cache)) == samples(10)


def test_a_head_that_is_forbidden_is_no_missing_shard(tmp_path, server):
    """Signed addresses are often for GET alone."""
    server.head_faults = dict.fromkeys([f"t-00000{number}.tar" for number in range(4)], ["always 403"])
    assert read_all(open_manifest(f"{server.url}/{SHARDS}", cache=cache_in(tmp_path / "cache"))) == samples(10)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("always 403", r"1 attempt .*HTTP 403 Forbidden: the server forbids it; check your access"),
        ("always 503", r"\d attempts in \d+ s, .*HTTP 503 .*: the server is busy; start again later"),
        ("always 500", r"\d attempts in \d+ s, .*HTTP 500 .*: the server fails; check the server"),
        ("always 418", r"1 attempt .*HTTP 418 .*: the server refuses the request; check the address"),
    ],
)
def test_a_size_that_cannot_be_asked_for_is_told_by_what_the_server_said(tmp_path, server, fault, message):
    """fsspec makes "not found" of all of them; the one at fault is named, not the first of the list."""
    server.head_faults["t-000002.tar"] = [fault]
    server.faults["t-000002.tar"] = [fault]
    with pytest.raises(ShardError, match=f"^{re.escape(server.url)}/t-000002.tar: cannot be fetched, {message}"):
        open_manifest(
            f"{server.url}/{SHARDS}", cache=cache_in(tmp_path / "cache", RetryPolicy(stall_sec=10.0, give_up_sec=1.0))
        )


def test_a_server_that_says_how_long_it_is_busy_is_left_alone_that_long(tmp_path, server):
    server.faults["manifest.json"] = [(503, {"Retry-After": "2"})]
    open_manifest(f"{server.url}/{SHARDS}", cache=cache_in(tmp_path / "cache"))
    first, second = server.asked_at[:2]
    assert second - first >= 2


def test_a_server_that_is_busy_for_longer_than_the_run_waits_is_an_error_at_once(tmp_path, server):
    """And a date that nobody can read is none."""
    server.faults["manifest.json"] = [(429, {"Retry-After": "yesterday"}), (429, {"Retry-After": "3600"})]
    with pytest.raises(
        ShardError, match="2 attempts .*HTTP 429 .*: the server is busy and asks to be left alone for 3600"
    ):
        open_manifest(f"{server.url}/{SHARDS}", cache=cache_in(tmp_path / "cache"))


@pytest.mark.parametrize("manifest", [True, False])
def test_a_page_in_the_place_of_a_shard_is_told(tmp_path, server, manifest):
    """A proxy's page to log in has status 200."""
    if not manifest:
        (tmp_path / "served" / "manifest.json").unlink()
    server.faults["t-000001.tar"] = ["always page"]
    cache = cache_in(tmp_path / "cache", RetryPolicy(stall_sec=1.0, give_up_sec=8.0))
    with pytest.raises(ShardError, match="t-000001.tar: cannot be fetched, 3 attempts .*a web page came .*to log in"):
        read_all(open_manifest(f"{server.url}/{SHARDS}", cache=cache))
    server.head_faults["t-000001.tar"] = ["always page"]
    if manifest:
        with pytest.raises(ShardError, match="t-000001.tar: a web page came in the place of the file"):
            open_manifest(f"{server.url}/{SHARDS}", cache=cache)


def test_a_shard_without_a_manifest_that_ended_early_is_fetched_again(tmp_path, server):
    """Without a length nobody but the tar itself can tell; what comes twice alike is the file."""
    (tmp_path / "served" / "manifest.json").unlink()
    server.faults["t-000001.tar"] = ["unannounced"]
    assert read_all(open_manifest(f"{server.url}/{SHARDS}", cache=cache_in(tmp_path / "cache"))) == samples(10)


def test_redirects_are_followed_and_a_circle_of_them_is_told(tmp_path, server):
    """Release pages and buckets redirect; the address that is asked for stays the shard's name."""
    (tmp_path / "served" / "far.tar").write_bytes((tmp_path / "served" / "t-000001.tar").read_bytes())
    far = (302, {"Location": f"{server.url}/far.tar"})
    server.faults["t-000001.tar"], server.head_faults["t-000001.tar"] = [far], [far]
    assert read_all(open_manifest(f"{server.url}/{SHARDS}", cache=cache_in(tmp_path / "cache"))) == samples(10)
    circle = (302, {"Location": f"{server.url}/t-000002.tar"})
    server.faults["t-000002.tar"] = [circle] * 30
    with pytest.raises(ShardError, match="1 attempt .*TooManyRedirects.*it redirects in a circle"):
        read_all(open_manifest(f"{server.url}/{SHARDS}", cache=cache_in(tmp_path / "other")))


def test_a_listing_is_told_by_what_the_server_said(tmp_path, server):
    server.listing_faults = ["always 403"]
    with pytest.raises(ShardError, match=r"cannot be listed, 1 attempt .*HTTP 403 Forbidden: the server forbids it"):
        open_manifest(f"{server.url}/t-*.tar", cache=cache_in(tmp_path / "cache"))
    with pytest.raises(ShardError, match=r"127.0.0.1:9/t-\*.tar: cannot be listed, .*cannot be reached"):
        open_manifest("http://127.0.0.1:9/t-*.tar", cache=cache_in(tmp_path / "cache", RetryPolicy(0.4, 0.5)))


class Busy(Exception):
    status = 503


class Gone(Exception):
    status = 404


@pytest.mark.parametrize(
    ("error", "code"), [(Busy(), 1), (TimeoutError("no byte came"), 1), (Gone(), 2), (MismatchError("other bytes"), 2)]
)
def test_an_outage_is_no_wrong_input(error, code, capsys, monkeypatch):
    """Exit code 2 tells a scheduler never to try again; a server that was busy for a while deserves another start."""
    monkeypatch.delenv("RANK", raising=False)

    def attempt() -> None:
        raise error

    def command() -> int:
        retry("https://host/a.tar", attempt, RetryPolicy(stall_sec=1.0, give_up_sec=0.0))
        return 0

    assert guarded(command) == code
    assert capsys.readouterr().err.startswith("error: https://host/a.tar: cannot be fetched, 1 attempt in 0 s")


def test_an_outage_is_one_on_every_rank(run_distributed):
    """srun's exit code is the largest of its tasks': one rank's 2 for another's outage would end the requeueing."""

    def command(world) -> tuple[str, str]:
        def fails() -> None:
            raise ShardOutageError("busy")

        found = []
        for ask in (
            lambda: on_main(world, fails),
            lambda: raise_together(ShardOutageError("busy") if world.rank else None),
        ):
            try:
                ask()
            except ConfigError as error:
                found.append(type(error).__name__)
        return tuple(found)

    assert run_distributed(command, 2) == [("OutageError", "OutageError")] * 2


def test_a_lack_of_memory_is_no_servers_fault():
    """It was tried again as one, until data.fetch_give_up_sec was over."""
    attempts = []

    def attempt():
        attempts.append(1)
        raise MemoryError

    with pytest.raises(MemoryError):
        retry("https://host/a.tar", attempt, RetryPolicy(stall_sec=1.0, give_up_sec=60.0))
    assert len(attempts) == 1
