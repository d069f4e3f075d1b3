"""Fetching in the background what the order says comes next."""

from __future__ import annotations

import os
import threading
import time

from swinv2_train.data.sample import ShardError
from swinv2_train.data.shards.shard_cache import TRANSFERS, RemoteShard, ShardCache
from swinv2_train.data.shards.transfers import redacted

_AGAIN_SEC = 0.5
"""Delay before a shard is tried again that another process was fetching, or for which there was no space."""


def _told(shard: RemoteShard, error: Exception) -> ShardError:
    said = ShardError(f"{redacted(shard.url)}: cannot be fetched ahead: {type(error).__name__}: {error}")
    said.__cause__ = error
    return said


class ShardPrefetcher:
    """Fetches shards into the cache before they are needed, each once while it is requested.

    It holds none of them: one that must go again, because the cache is small, is fetched when it is read.  The threads
    belong to the process that calls `request`; they are daemons, so nothing waits for them at exit.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._changed = threading.Condition()
        self._wanted: list[RemoteShard] = []
        self._begun: set[RemoteShard] = set()
        self._not_before: dict[RemoteShard, float] = {}
        self._failed: dict[RemoteShard, ShardError] = {}
        self._threads: list[threading.Thread] = []
        self._closed = False

    def request(self, shards: list[RemoteShard]) -> None:
        """Shards that will be read, the most urgent first."""
        with self._changed:
            if self._wanted == shards:
                return
            self._wanted = shards
            self._begun &= set(shards)
            while len(self._threads) < min(TRANSFERS, len(shards)):
                self._threads.append(threading.Thread(target=self._run, daemon=True))
                self._threads[-1].start()
            self._changed.notify_all()

    def check(self, shard: RemoteShard) -> None:
        """Raise the ShardError with which fetching the shard failed, so that nobody tries it all over again."""
        with self._changed:
            if shard in self._failed:
                raise self._failed[shard]

    def close(self) -> None:
        """The threads end with their transfers."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                shard = None if self._closed else self._next()
                if shard is None:
                    if self._closed:
                        return
                    self._changed.wait(_AGAIN_SEC)
                    continue
            self._fetch(shard)

    def _next(self) -> RemoteShard | None:
        now = time.monotonic()
        for shard in self._wanted:
            if shard not in self._begun and self._not_before.get(shard, 0.0) <= now:
                self._begun.add(shard)
                return shard
        return None

    def _fetch(self, shard: RemoteShard) -> None:
        try:
            found = self._cache.open(shard, wait=False)
        except Exception as error:  # noqa: BLE001  nobody else hears a thread
            with self._changed:
                said = error if isinstance(error, ShardError) else _told(shard, error)
                self._failed[shard] = said
            return
        if found is not None:
            os.close(found[0])
            return
        with self._changed:  # another process is fetching it, or there is no space yet
            self._begun.discard(shard)
            self._not_before[shard] = time.monotonic() + _AGAIN_SEC
