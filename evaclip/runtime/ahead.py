"""Work done ahead of who needs it, in threads, in order."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Full, Queue
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def ahead(items: Iterable[T], function: Callable[[T], U], *, threads: int, depth: int) -> Iterator[U]:
    """Yields `function(item)` of each item, in order, computed by threads before it is asked for.

    One thread alone goes through `items`; what it raises is raised here, behind the results of the items before, and
    what `function` raises in the place of its result. Whoever stops early ends the work: no further item begins.

    Args:
        threads: that run `function`, 1 or more.
        depth: results that are done or under way at most.
    """
    queue: Queue[Future[U] | None] = Queue(depth)
    stopped = threading.Event()

    def put(future: Future[U] | None) -> bool:
        while not stopped.is_set():
            try:
                queue.put(future, timeout=0.1)
            except Full:
                continue
            return True
        return False

    def feed() -> None:
        try:
            for item in items:
                if not put(pool.submit(function, item)):
                    return
        except BaseException as exc:
            failed = Future[U]()
            failed.set_exception(exc)
            put(failed)
        put(None)

    with ThreadPoolExecutor(threads, "evaclip-ahead") as pool:
        feeder = threading.Thread(target=feed, name="evaclip-feed", daemon=True)
        feeder.start()
        try:
            while (future := queue.get()) is not None:
                yield future.result()
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            feeder.join()
