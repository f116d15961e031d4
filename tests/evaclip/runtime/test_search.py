"""A search finds exactly what comparing everything finds."""

import numpy as np
import pytest
from store_makers import filled, named, unit

from evaclip.errors import UserError
from evaclip.runtime import search as module
from evaclip.runtime.search import search
from evaclip.runtime.store import Row, Store


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 64)
    monkeypatch.setattr(module, "_processors", lambda: 3)


def best(store, query, top, allowed=None):
    scores = store.embeddings.astype(np.float32) @ (query / np.linalg.norm(query))
    numbers = np.flatnonzero(store.alive() if allowed is None else allowed)
    order = np.lexsort((numbers, -scores[numbers]))[:top]
    return scores[numbers][order], numbers[order]


def outlying(vectors):
    """One coordinate far larger than the others, as CLIP models have it."""
    vectors[:, 3] = 2
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("make", [unit, lambda *given: outlying(unit(*given))])
@pytest.mark.parametrize("top", [1, 10, 200])
def test_it_is_exact(tmp_path, make, top):
    store = filled(tmp_path, make(5000, 96))
    store.remove([f"{n}.jpg" for n in range(0, 5000, 7)])
    queries = 3 * make(8, 96, 5)
    scores, numbers = search(store, queries, top)
    for one, query in enumerate(queries):
        expected_scores, expected = best(store, query, top)
        np.testing.assert_array_equal(numbers[one], expected)
        np.testing.assert_allclose(scores[one], expected_scores, atol=1e-6)


def test_near_ties_are_told_apart(tmp_path):
    vectors = unit(1, 64) + 1e-3 * unit(3000, 64, 1)
    store = filled(tmp_path, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    query = unit(1, 64)[0]
    np.testing.assert_allclose(search(store, query)[0], best(store, query, 10)[0], atol=1e-7)


def test_of_equal_rows_the_first_come_first(tmp_path):
    store = filled(tmp_path, np.repeat(unit(1), 500, axis=0))
    assert search(store, unit(1)[0], 5)[1].tolist() == [0, 1, 2, 3, 4]


def test_conditions_and_fewer_rows_than_asked_for(tmp_path):
    store = filled(tmp_path, unit(300))
    query = unit(1, seed=3)[0]
    _, numbers = search(store, query, 10, "year<2100 and year>=2040")
    allowed = (np.arange(300) >= 40) & (np.arange(300) < 100)
    np.testing.assert_array_equal(numbers, best(store, query, 10, allowed)[1])
    assert len(search(store, query, 10, "year<2003")[1]) == 3
    assert search(store, query, 10, "year<2000")[1].shape == (0,)
    empty = Store.create(tmp_path / "empty", {"dim": 24})
    assert search(empty, np.ones((2, 24)))[0].shape == (2, 0)


def test_it_sees_what_was_replaced(tmp_path):
    store = filled(tmp_path, unit(50))
    query = unit(50)[7]
    assert search(store, query, 1)[1].tolist() == [7]
    store.add(-query[None], [Row("7.jpg", "new")])
    assert search(store, query, 1)[1].tolist() != [7]
    assert search(store, -query, 1)[1].tolist() == [50]
    assert len(named(1)) == 1


@pytest.mark.parametrize(
    ("query", "top", "reason"),
    [
        (np.ones(5), 1, r"a query is \[5\]; expected \[24\]"),
        (np.zeros(24), 1, "no direction"),
        (np.full(24, np.nan), 1, "no direction"),
        (np.ones(24), 0, "top is 0"),
    ],
)
def test_wrong_queries(tmp_path, query, top, reason):
    with pytest.raises(UserError, match=reason):
        search(filled(tmp_path, unit(3)), query, top)
