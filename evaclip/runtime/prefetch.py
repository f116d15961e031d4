"""Results that threads compute in advance, in order."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Full, Queue
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def prefetch(items: Iterable[T], function: Callable[[T], U], *, threads: int, depth: int) -> Iterator[U]:
    """Yields `function(item)` of each item in order; threads compute the results in advance.

    A single thread iterates `items`. Its exception is raised after the results of earlier items, an exception of
    `function` in place of its result. Closing the iterator stops the threads.

    Args:
        threads: number of threads that run `function`.
        depth: maximum number of finished and running results.
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

    with ThreadPoolExecutor(threads, "evaclip-stream") as pool:
        feeder = threading.Thread(target=feed, name="evaclip-feed", daemon=True)
        feeder.start()
        try:
            while (future := queue.get()) is not None:
                yield future.result()
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            feeder.join()
