"""A search finds exactly what comparing everything in float64 finds."""

from importlib.util import find_spec

import numpy as np
import pytest
from store_makers import filled, named, unit

from evaclip.errors import UserError
from evaclip.runtime.search import build_approximate, search, search_approximate
from evaclip.runtime.store import Store

needs_faiss = pytest.mark.skipif(find_spec("faiss") is None, reason="the extra faiss isn't installed")


def best(store, query, top, allowed=None):
    scores = store.embeddings.astype(np.float64) @ (query / np.linalg.norm(query))
    numbers = np.flatnonzero(store.alive() if allowed is None else allowed)
    order = np.lexsort((numbers, -scores[numbers]))[:top]
    return scores[numbers][order], numbers[order]


def outlying(vectors):
    """One coordinate far larger than the others, as CLIP models have it."""
    vectors[:, 3] = 2
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("make", [unit, lambda *given: outlying(unit(*given))])
@pytest.mark.parametrize("top", [1, 200])
def test_search_is_exact(tmp_path, make, top):
    store = filled(tmp_path, make(5000, 96))
    store.remove([f"{n}.jpg" for n in range(0, 5000, 7)])
    queries = 3 * make(40, 96, 5)
    scores, numbers = search(store, queries, top)
    for one, query in enumerate(queries):
        expected = best(store, query, top)[0]
        assert len(set(numbers[one])) == top
        np.testing.assert_allclose(scores[one], expected, rtol=0, atol=1e-6)
        found = store.embeddings[numbers[one]].astype(np.float64) @ (query / np.linalg.norm(query))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # rows that near may change places


def test_search_of_equal_rows_takes_the_first(tmp_path):
    store = filled(tmp_path, np.repeat(unit(1), 5003, axis=0))
    assert search(store, unit(1)[0], 5)[1].tolist() == [0, 1, 2, 3, 4]


def test_search_with_conditions_and_few_rows(tmp_path):
    store = filled(tmp_path, unit(300))
    query = unit(1, seed=3)[0]
    for low, high in ((2040, 2100), (2040, 2060)):  # many rows and few
        numbers = search(store, query, 10, f"year<{high} and year>={low}")[1]
        allowed = (np.arange(300) >= low - 2000) & (np.arange(300) < high - 2000)
        np.testing.assert_array_equal(numbers, best(store, query, 10, allowed)[1])
    assert len(search(store, query, 10, "year<2003")[1]) == 3
    assert search(store, query, 10, "year<2000")[1].shape == (0,)
    empty = Store.create(tmp_path / "empty", {"dim": 24})
    assert search(empty, np.ones((2, 24)))[0].shape == (2, 0)


@pytest.mark.parametrize(
    ("query", "top", "argument"),
    [(np.ones(5), 1, "query"), (np.zeros(24), 1, "query"), (np.full(24, np.nan), 1, "query"), (np.ones(24), 0, "top")],
)
def test_search_wrong_input(tmp_path, query, top, argument):
    with pytest.raises(UserError, match=argument):
        search(filled(tmp_path, unit(3)), query, top)


@needs_faiss
def test_approximate_finds_most_and_new_rows(tmp_path):
    store = filled(tmp_path, unit(3000))
    with pytest.raises(UserError, match="has no approximate index"):
        search_approximate(store, unit(1)[0])
    build_approximate(store)
    queries = unit(20, seed=4)
    exact, found = search(store, queries)[1], search_approximate(store, queries)[1]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]) > 0.95
    assert (search_approximate(store, queries, probes=1)[1] != exact).any()
    store.remove(["7.jpg"])
    assert 7 not in search_approximate(store, unit(3000)[7], 1)[1]
    store.add(unit(1, seed=8), named(1, 9000))
    assert search_approximate(store, unit(1, seed=8)[0], 1)[1].tolist() == [3000]


@needs_faiss
def test_approximate_with_conditions_and_few_rows(tmp_path):
    store = filled(tmp_path, unit(400))
    build_approximate(store)
    query = unit(1, seed=3)[0]
    for top, where in ((10, "year>=2040 and year<2060"), (30, "year<2020"), (400, None), (5, "year<2000")):
        numbers = search_approximate(store, query, top, where, probes=1)[1]
        assert numbers.shape == search(store, query, top, where)[1].shape
        assert where is None or set(numbers) <= set(store.select(where))
    with pytest.raises(UserError, match="probes"):
        search_approximate(store, query, probes=0)
