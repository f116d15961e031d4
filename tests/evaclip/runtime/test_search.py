"""A search finds exactly what comparing everything finds."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_makers import filled, unit

import evakernels
from evaclip.errors import UserError
from evaclip.runtime import codes
from evaclip.runtime.search import search
from evaclip.runtime.store import Row, Store

NATIVE = evakernels.info()["native"]
pytestmark = pytest.mark.filterwarnings("ignore:evakernels is installed without compiled code")


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def way(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(codes, "_BLOCK", 64)
        monkeypatch.setattr(codes, "_compiled", lambda: None)
    elif not NATIVE["loaded"]:
        pytest.skip(NATIVE["reason"])


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


# Of whole numbers, which float32 adds exactly.
SCAN = """
import sys
import numpy as np
from evaclip.runtime import _scan
from evaclip.runtime.codes import _possible
draw = np.random.default_rng(0)
for rows, dim, top in ((1, 1, 1), (300, 7, 3), (9000, 130, 10), (5000, 96, 4000), (20000, 24, 1)):
    codes, queries = draw.integers(-3, 4, (rows, dim), np.int8), draw.integers(-3, 4, (3, dim), np.int16)
    about = np.concatenate([np.ones((rows, 1)), draw.integers(0, 3, (rows, 1))], axis=1, dtype=np.float32)
    about_queries = np.array([[1, 0, 0], [1, 1, 0], [0.5, 0.5, 2]], np.float32)
    for numbers in (None, np.sort(draw.permutation(rows)[: max(top, rows // 2)])):
        given = codes, about, queries, about_queries, top, numbers
        for threads in (1, 3):
            for found, expected in zip(_scan.possible(*given, threads), _possible(*given), strict=True):
                np.testing.assert_array_equal(found, expected)
"""


@pytest.mark.parametrize("isa", NATIVE.get("isas_available", []))
def test_compiled_and_numpy_find_the_same(way, isa):
    del way
    environment = os.environ | {"EVAKERNELS_ISA": isa}
    subprocess.run(
        [sys.executable, "-W", "error", "-c", SCAN], check=True, env=environment, cwd=Path(codes.__file__).parents[2]
    )


def test_the_largest_sums_fit(tmp_path):
    dim = 1536
    signs = np.ones((40, dim), np.float32)
    signs[1:, 0] = -1
    signs[20:] *= -1
    store = filled(tmp_path, signs / np.sqrt(dim))
    assert search(store, np.ones(dim), 1)[1].tolist() == [0]


def test_without_compiled_code_it_warns(tmp_path, monkeypatch):
    monkeypatch.setattr(codes, "_compiled", lambda: None)
    with pytest.warns(UserWarning, match="without compiled code"):
        search(filled(tmp_path, unit(3)), np.ones(24))
