"""Files at addresses that fsspec knows (https://, s3://, ...): listed, measured and fetched whole, in spite of faults.

What the server said decides (answers.py): every fault of the network or the server is tried again, with growing pauses
or as long as it asked for, until a time limit; what retrying cannot fix (not there, not allowed) is an error at once.
Clients are opened in the process that uses them: fsspec's event loop does not survive a fork, and its instance cache
starts empty in a child.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from swinv2_train.config import MachineError
from swinv2_train.data.sample import ShardError, ShardOutageError
from swinv2_train.data.shards.answers import Kind, MismatchError, answer_of, text_of

Result = TypeVar("Result")
_FIRST_PAUSE_SEC, _LONGEST_PAUSE_SEC = 0.5, 60.0
_WEB = ("http", "https")
_MISMATCHES = 3
"""How often wrong bytes are taken for a bad transfer; after that the file itself is wrong."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long a transfer may take, and how long it is retried."""

    stall_sec: float
    """A transfer that brings no byte for this long is cut off and tried again."""
    give_up_sec: float
    """After this long, over all attempts, the error is final."""


ONCE = RetryPolicy(stall_sec=30.0, give_up_sec=0.0)
"""For who has no policy: a question, and its answer."""


def is_remote(path: str) -> bool:
    """True for an address, false for a path of this machine."""
    return "://" in path


def redacted(url: str) -> str:
    """An address as it may appear in a log: without user, password and query, which may be a signature."""
    return re.sub(r"(?<=://)[^/?#]*@", "", url).split("?")[0] if is_remote(url) else url


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


def list_matching(url: str, retry_policy: RetryPolicy) -> list[str]:
    """The addresses that a wildcard matches, sorted; empty where the server does not list.  Raises ShardError."""

    def attempt() -> list[str]:
        fs, path = _filesystem(url, retry_policy.stall_sec)
        if not fs.async_impl:
            return [str(fs.unstrip_protocol(found)) for found in fs.glob(path)]
        started, limit_sec = time.monotonic(), max(retry_policy.stall_sec, retry_policy.give_up_sec)

        async def ask() -> list[str]:
            if urlsplit(url).scheme in _WEB:  # its glob takes a server that cannot be reached for an empty folder
                await fs._ls_real(path[: re.search(r"[*\[]", path).start()].rpartition("/")[0] + "/")  # type: ignore[union-attr]
            return [str(fs.unstrip_protocol(found)) for found in await fs._glob(path)]

        try:
            listed: list[str] = _wait(fs, ask(), lambda: time.monotonic() - started > limit_sec)
            return listed
        except Exception as error:
            if answer_of(error).kind is Kind.MISSING:
                return []
            raise

    return sorted(retry(redacted(url), attempt, retry_policy, failed="cannot be listed"))


class Found(NamedTuple):
    """What a server says of a file."""

    size: int | None
    """Bytes; None where it does not say."""
    page: bool
    """Whether it says that it is a web page."""


class _OneFailed(Exception):
    """What was the matter with one of several files."""

    def __init__(self, url: str, error: BaseException) -> None:
        super().__init__(url, error)
        self.url, self.error = url, error


def sizes(urls: Sequence[str], retry_policy: RetryPolicy) -> list[Found]:
    """What the server says of each file.  Raises ShardError naming the first that is missing."""
    found: list[Found] = []
    for first in range(0, len(urls), 256):  # a server that fails in between is not asked for everything again
        part = list(urls[first : first + 256])
        found += retry(redacted(part[0]), lambda part=part: _sizes(part, retry_policy), retry_policy)  # type: ignore[misc]
    return found


def _sizes(urls: list[str], retry_policy: RetryPolicy) -> list[Found]:
    fs, _ = _filesystem(urls[0], retry_policy.stall_sec)
    paths = [fs._strip_protocol(url) for url in urls]
    if not fs.async_impl:
        return [Found(fs.info(path)["size"], False) for path in paths]

    async def ask() -> list[Any]:
        gate = asyncio.Semaphore(16)

        async def one(path: str) -> Any:
            async with gate:
                return await asyncio.wait_for(fs._info(path), retry_policy.stall_sec)

        return await asyncio.gather(*(one(path) for path in paths), return_exceptions=True)

    answers = _wait(fs, ask(), lambda: False)
    failed = [(url, answer) for url, answer in zip(urls, answers, strict=True) if isinstance(answer, BaseException)]
    for url, answer in failed:
        if answer_of(answer).kind is Kind.MISSING:
            raise ShardError(f"{redacted(url)} does not exist; name the shards that are there, or put it there again")
    for url, answer in sorted(failed, key=lambda each: answer_of(each[1]).again):  # what stays as it is comes first
        raise _OneFailed(url, answer)
    return [Found(answer["size"], str(answer.get("mimetype", "")).startswith("text/html")) for answer in answers]


def download(
    url: str, destination: str, retry_policy: RetryPolicy, most_bytes: int, abandon: threading.Event | None = None
) -> None:
    """One attempt to copy the whole file at `url`, of at most most_bytes, to the local path `destination`.

    Raises what the client raises, TimeoutError when no byte comes for retry_policy.stall_sec or abandon is set,
    MismatchError as soon as more bytes have come: a server may send without end.
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
        lambda: time.monotonic() - moved[0] > retry_policy.stall_sec or (abandon is not None and abandon.is_set()),
    )


def retry(
    what: str,
    attempt: Callable[[], Result],
    retry_policy: RetryPolicy,
    waited_sec: float = 0.0,
    failed: str = "cannot be fetched",
    abandon: threading.Event | None = None,
) -> Result:
    """The result of `attempt`, repeated with growing, randomly shortened pauses until retry_policy.give_up_sec is over.

    A server that says how long it is busy (Retry-After) is left alone that long.  what: the redacted address, for the
    error; failed: what could not be done with it.  waited_sec: counts as already spent.  abandon: another thread sets
    it to end this.  Raises ShardError, and ShardOutageError where another time may do.
    """
    started = time.monotonic() - waited_sec
    jitter = random.Random()  # its own: the global generator belongs to the training
    attempts = mismatches = 0
    while True:
        attempts += 1
        try:
            return attempt()
        except (ShardError, MachineError, MemoryError):  # of no server
            raise
        except Exception as raised:  # noqa: BLE001  every client has its own errors
            error: BaseException = raised
            if isinstance(raised, _OneFailed):
                what, error = redacted(raised.url), raised.error
            answer = answer_of(error)
            mismatches += answer.kind in (Kind.MISMATCH, Kind.PAGE)
            spent = time.monotonic() - started
            pause = min(_FIRST_PAUSE_SEC * 2 ** (attempts - 1), _LONGEST_PAUSE_SEC) * jitter.uniform(0.5, 1.0)
            pause = max(pause, answer.wait_sec or 0.0)
            abandoned = abandon is not None and abandon.is_set()
            wrong = not answer.again or answer.kind in (Kind.MISMATCH, Kind.PAGE)
            if abandoned or not answer.again or mismatches >= _MISMATCHES or spent + pause > retry_policy.give_up_sec:
                asked = f" and asks to be left alone for {answer.wait_sec:.0f} s" if answer.wait_sec else ""
                raise (ShardError if wrong else ShardOutageError)(
                    f"{what}: {failed}, {attempts} attempt{'s' * (attempts > 1)} in {spent:.0f} s, the last "
                    f"ended with: {text_of(error)}: {answer.kind.value}{asked}; {answer.remedy}"
                ) from error
        if abandon is None:
            time.sleep(pause)
        else:
            abandon.wait(pause)


def _filesystem(url: str, stall_sec: float) -> tuple[Any, str]:
    """fsspec's client for the address, and the path that this client understands."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    options: dict[str, Any] = {}
    scheme = urlsplit(url).scheme
    if scheme in _WEB:
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
