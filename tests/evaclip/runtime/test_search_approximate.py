"""The approximate index: what it finds, and what has changed since it was built."""

import numpy as np
import pytest
from store_makers import filled, named, unit

from evaclip.errors import UserError
from evaclip.runtime.search import search

pytest.importorskip("usearch")
from evaclip.runtime.approximate import build_approximate, search_approximate


def test_it_finds_most_of_the_nearest_and_what_is_new(tmp_path):
    store = filled(tmp_path, unit(2000))
    with pytest.raises(UserError, match="has no approximate index"):
        search_approximate(store, unit(1)[0])
    build_approximate(store)
    queries = unit(20, seed=4)
    exact, found = search(store, queries)[1], search_approximate(store, queries)[1]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]) > 0.95
    store.remove(["7.jpg"])
    assert 7 not in search_approximate(store, unit(2000)[7], 1)[1]
    store.add(unit(1, seed=8), named(1, 9000))
    assert search_approximate(store, unit(1, seed=8)[0], 1)[1].tolist() == [2000]
    store.compact()
    with pytest.raises(UserError, match="has no approximate index"):
        search_approximate(store, unit(1)[0])
