"""The approximate index: what it finds, and what has changed since it was built."""

import numpy as np
import pytest
from store_makers import filled, named, unit

from evaclip.errors import UserError
from evaclip.runtime.approximate import build_approximate, search_approximate
from evaclip.runtime.search import search
from evaclip.runtime.store import Store

pytest.importorskip("faiss", reason="the extra faiss isn't installed")


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


def test_approximate_index_of_a_newer_store(tmp_path):
    store = filled(tmp_path, unit(40))
    with Store.open(tmp_path) as other:
        other.add(unit(40, seed=8), named(40, 9000))
        build_approximate(other)
        assert len(list(tmp_path.glob("faiss-*.index"))) == 1
    assert search_approximate(store, unit(1)[0], 80)[1].max() < 40
    with pytest.raises(UserError, match="no rows"):
        build_approximate(Store.create(tmp_path / "empty", {"dim": 24}))
