"""Fetches the shards that will be read next, while others are read."""

import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from evaclip.data.remote import RemoteError
from evaclip.data.shard_cache import Check, ShardCache, Wanted
from evaclip.errors import UserError

_LOG = logging.getLogger("evaclip.data")


@dataclass(frozen=True)
class Copy:
    """A local copy of a remote shard, there or not.

    Attributes:
        size: about as many bytes.
    """

    cache: ShardCache
    shard: Wanted
    check: Check
    size: int


class Prefetcher:
    """One thread of each process that reads, started when it is first needed.

    Processes divide the work among themselves: a shard that another one fetches at the moment is left to it.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._copies = list[Copy]()
        self._news = threading.Event()
        self._thread: threading.Thread | None = None

    def want(self, copies: Iterable[Copy]) -> None:
        """Fetches these in the background, in order and as many as fit, in place of those that were named before."""
        if self._process != os.getpid():
            self.__init__()  # type: ignore[misc]  # a thread isn't forked
        self._copies = _those_that_fit(copies)
        if not self._copies:
            return
        self._news.set()
        if self._thread is None:
            # A daemon: a worker that ends doesn't wait for what it won't read.
            self._thread = threading.Thread(target=self._run, name="evaclip-prefetch", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            for copy in self._copies:
                try:
                    copy.cache.fetch_ahead(copy.shard, copy.check)
                except (RemoteError, UserError) as exc:  # who reads the shard is told
                    _LOG.debug("%s is not fetched ahead: %s", copy.shard.url, exc)
                if self._news.is_set():
                    break

    def __reduce__(self) -> Any:
        return Prefetcher, ()


def _those_that_fit(copies: Iterable[Copy]) -> list[Copy]:
    chosen, total = list[Copy](), 0
    for copy in copies:
        total += copy.size
        if total > copy.cache.capacity:
            break
        chosen.append(copy)
    return chosen
