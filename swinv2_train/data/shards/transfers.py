"""Files at addresses that fsspec knows (https://, s3://, ...): listed, measured and fetched whole, in spite of faults.

Every fault of the network or the server is tried again, with growing pauses, until a time limit; what retrying
cannot fix (not there, not allowed) is an error at once.  Clients are opened in the process that uses them: fsspec's
event loop does not survive a fork, and its instance cache starts empty in a child.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from swinv2_train.data.sample import ShardError

Result = TypeVar("Result")
_FIRST_PAUSE_SEC, _LONGEST_PAUSE_SEC = 0.5, 60.0
_MISMATCHES = 3
"""How often wrong bytes are taken for a bad transfer; after that the file itself is wrong."""


class MismatchError(Exception):
    """The bytes that came are not those of the manifest."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long a transfer may take, and how long it is retried."""

    stall_sec: float
    """A transfer that brings no byte for this long is cut off and tried again."""
    give_up_sec: float
    """After this long, over all attempts, the error is final."""


def is_remote(path: str) -> bool:
    """True for an address, false for a path of this machine."""
    return "://" in path


def redacted(url: str) -> str:
    """An address as it may appear in a log: without user, password and query, which may be a signature."""
    return re.sub(r"(?<=://)[^/@]*@", "", url).split("?")[0] if is_remote(url) else url


def base_name(url: str) -> str:
    """The file's own name."""
    return os.path.basename(url.split("?")[0])


def folder_of(url: str) -> str:
    """The address of the folder, with a slash at its end."""
    path = url.split("?")[0]
    return path[: len(path) - len(base_name(url))]


def sibling_url(url: str, name: str) -> str:
    """The address of another file of the same folder."""
    query = url.split("?", 1)
    return folder_of(url) + name + (f"?{query[1]}" if len(query) > 1 else "")


def list_matching(url: str) -> list[str]:
    """The addresses that a wildcard matches, sorted; empty where the server does not list."""
    fs, path = _filesystem(url, stall_sec=30.0)
    try:
        return sorted(str(fs.unstrip_protocol(found)) for found in fs.glob(path))
    except FileNotFoundError:
        return []
    except Exception as error:  # noqa: BLE001  every client has its own errors
        raise ShardError(f"{redacted(url)}: cannot be listed: {_text(error)}; check the address") from error


def sizes(urls: Sequence[str], retry_policy: RetryPolicy) -> list[int | None]:
    """Bytes of each file, None where the server does not say.  Raises ShardError naming the first that is missing."""
    found: list[int | None] = []
    for first in range(0, len(urls), 256):  # a server that fails in between is not asked for everything again
        part = list(urls[first : first + 256])
        found += retry(redacted(part[0]), lambda part=part: _sizes(part, retry_policy), retry_policy)  # type: ignore[misc]
    return found


def _sizes(urls: list[str], retry_policy: RetryPolicy) -> list[int | None]:
    fs, _ = _filesystem(urls[0], retry_policy.stall_sec)
    paths = [fs._strip_protocol(url) for url in urls]
    if not fs.async_impl:
        return [fs.info(path)["size"] for path in paths]

    async def ask() -> list[Any]:
        gate = asyncio.Semaphore(16)

        async def one(path: str) -> Any:
            async with gate:
                return await asyncio.wait_for(fs._info(path), retry_policy.stall_sec)

        return await asyncio.gather(*(one(path) for path in paths), return_exceptions=True)

    answers = _wait(fs, ask(), lambda: False)
    for url, answer in zip(urls, answers, strict=True):
        if isinstance(answer, FileNotFoundError):
            raise ShardError(f"{redacted(url)} does not exist; name the shards that are there, or put it there again")
        if isinstance(answer, BaseException):
            raise answer
    return [answer["size"] for answer in answers]


def download(url: str, destination: str, retry_policy: RetryPolicy, most_bytes: int) -> None:
    """One attempt to copy the whole file at `url`, of at most most_bytes, to the local path `destination`.

    Raises what the client raises, TimeoutError when no byte comes for retry_policy.stall_sec, MismatchError as soon as
    more bytes have come: a server may send without end.
    """
    from fsspec.callbacks import Callback  # type: ignore[import-untyped]

    moved = [time.monotonic()]
    come = [0]

    class Watch(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            moved[0] = time.monotonic()
            come[0] += inc
            if come[0] > most_bytes:
                raise MismatchError(f"more than {most_bytes:,} bytes came")

    fs, path = _filesystem(url, retry_policy.stall_sec)
    if not fs.async_impl:
        fs.get_file(path, destination, callback=Watch())
        return

    _wait(
        fs,
        fs._get_file(path, destination, callback=Watch()),
        lambda: time.monotonic() - moved[0] > retry_policy.stall_sec,
    )


def retry(what: str, attempt: Callable[[], Result], retry_policy: RetryPolicy, waited_sec: float = 0.0) -> Result:
    """The result of `attempt`, repeated with growing, randomly shortened pauses until retry_policy.give_up_sec is over.

    what: the redacted address, for the error.  waited_sec: counts as already spent.  Raises ShardError.
    """
    started = time.monotonic() - waited_sec
    jitter = random.Random()  # its own: the global generator belongs to the training
    attempts = mismatches = 0
    while True:
        attempts += 1
        try:
            return attempt()
        except ShardError:
            raise
        except Exception as error:  # noqa: BLE001  every client has its own errors
            mismatches += isinstance(error, MismatchError)
            spent = time.monotonic() - started
            pause = min(_FIRST_PAUSE_SEC * 2 ** (attempts - 1), _LONGEST_PAUSE_SEC) * jitter.uniform(0.5, 1.0)
            if _final(error) or mismatches >= _MISMATCHES or spent + pause > retry_policy.give_up_sec:
                raise ShardError(
                    f"{what}: cannot be fetched, {attempts} attempt{'s' * (attempts > 1)} in {spent:.0f} s, the last "
                    f"ended with: {_text(error)}; {_remedy(error)}"
                ) from error
        time.sleep(pause)


def _final(error: Exception) -> bool:
    """Whether retrying cannot help."""
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return refused or isinstance(error, (FileNotFoundError, PermissionError, ImportError, ValueError))


def _remedy(error: Exception) -> str:
    if isinstance(error, MismatchError):
        return "the file is not the one that was indexed: put it there again, or make its manifest again"
    if isinstance(error, ImportError):
        return "install the client that it names"
    if _final(error):
        return "check the address and your access to it"
    return "check the server and the network, or raise data.fetch_give_up_sec"


def _text(error: BaseException) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {re.sub(r'[?][^ ]*', '', text)}" if text else type(error).__name__


def _filesystem(url: str, stall_sec: float) -> tuple[Any, str]:
    """fsspec's client for the address, and the path that this client understands."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    options: dict[str, Any] = {}
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        # aiohttp's own limit is 5 minutes for everything together, too little for a large shard
        timeout = ClientTimeout(total=None, sock_connect=stall_sec)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    elif scheme in ("s3", "s3a"):
        options["max_concurrency"] = 1  # one stream per shard, so that its progress shows
    fs, path = url_to_fs(url, **options)
    return fs, path


def _wait(fs: Any, coroutine: Any, stalled: Callable[[], bool]) -> Any:
    """The coroutine's result, run in the client's own event loop; TimeoutError when `stalled` turns true."""
    import concurrent.futures

    future = asyncio.run_coroutine_threadsafe(coroutine, fs.loop)
    while True:
        try:
            return future.result(timeout=0.1)
        except concurrent.futures.TimeoutError as error:
            if future.done():  # the coroutine's own
                raise
            if stalled():
                future.cancel()
                raise TimeoutError("no byte came") from error
