"""Items that wait at the same time are computed together, each gets its own result, and the thread lives."""

import threading
from concurrent.futures import wait

import pytest

from evaclip.serve.batching import Batcher, QueueFull


class Held:
    """A computation that waits to be let go, and notes what it was given."""

    def __init__(self):
        self.begun, self.go, self.batches = threading.Event(), threading.Event(), []

    def __call__(self, items):
        self.batches.append(list(items))
        self.begun.set()
        assert self.go.wait(10)
        if "bad" in items:
            raise ValueError("a bad one")
        return [item * 2 for item in items]


@pytest.fixture
def held():
    return Held()


@pytest.fixture
def batcher(held):
    made = Batcher({"a": held, "b": lambda items: [-item for item in items]}, size=4, delay=0, depth=8)
    yield made
    held.go.set()
    made.close()


def _submit(batcher, kind, item):
    (future,) = batcher.submit(kind, [item])
    return future


def _first(batcher, held):
    future = _submit(batcher, "a", "first")
    assert held.begun.wait(10)
    return future


def test_batcher_joins_waiting_items(batcher, held):
    futures = [_first(batcher, held)] + [_submit(batcher, "a", str(number)) for number in range(6)]
    held.go.set()
    assert [future.result(10) for future in futures] == ["firstfirst", *(str(number) * 2 for number in range(6))]
    assert held.batches == [["first"], ["0", "1", "2", "3"], ["4", "5"]]


def test_batcher_waits_for_the_delay():
    sizes = []
    batcher = Batcher({"a": list}, size=2, delay=10, depth=8, observe=lambda kind, count: sizes.append((kind, count)))
    wait([_submit(batcher, "a", 1), _submit(batcher, "a", 2)], timeout=5)
    batcher.close()
    assert sizes == [("a", 2)]


def test_batcher_takes_oldest_kind_first(batcher, held):
    first = _first(batcher, held)
    other, later = _submit(batcher, "b", 5), _submit(batcher, "a", "later")
    other.add_done_callback(lambda future: held.batches.append("b"))
    held.go.set()
    assert (first.result(10), other.result(10), later.result(10)) == ("firstfirst", -5, "laterlater")
    assert held.batches == [["first"], "b", ["later"]]


def test_batcher_drops_cancelled_items(batcher, held):
    _first(batcher, held)
    waiting = [_submit(batcher, "a", str(number)) for number in range(8)]
    with pytest.raises(QueueFull):
        _submit(batcher, "a", "one too many")
    for future in waiting[:7]:
        assert future.cancel()
    assert batcher.waiting() == 1
    added = _submit(batcher, "a", "new")
    held.go.set()
    assert added.result(10) == "newnew"
    assert held.batches == [["first"], ["7", "new"]]


def test_batcher_bad_item_fails_alone(batcher, held):
    _first(batcher, held)
    futures = [_submit(batcher, "a", item) for item in ("x", "bad", "y")]
    held.go.set()
    assert (futures[0].result(10), futures[2].result(10)) == ("xx", "yy")
    with pytest.raises(ValueError, match="a bad one"):
        futures[1].result(10)
    assert _submit(batcher, "a", "z").result(10) == "zz"
    assert batcher.alive
