"""The rows of a store that are nearest to a query: exact cosines with every row, or an approximate index by faiss."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaclip.atomic import reading, replacing, writing
from evaclip.errors import UserError
from evaclip.extras import import_extra
from evaclip.runtime.store import Store

Scores = NDArray[np.float32]
Numbers = NDArray[np.int64]

_QUERIES = 16
"""Queries that are compared at once, which bounds the memory of their scores."""
_ROUNDING = 1e-5
"""More than float32 cosines are wrong by, whatever the order of the additions."""
_SAMPLE = 64
"""Rows a list that its centroid is made of."""
_BLOCK = 65_536
_SPARE = 4
"""Rows compared again exactly, as a multiple of `top`."""


def search(
    store: Store, query: NDArray[np.floating[Any]], top: int = 10, where: str | None = None
) -> tuple[Scores, Numbers]:
    """The nearest rows and their cosines, best first; of equal ones the lower number first.

    Args:
        query: float `[dim]` or `[q, dim]`, of any length but 0.
        top: how many for each query; fewer where the store, or the condition, has fewer rows.
        where: a condition on the rows, see `Store.select`.

    Returns:
        scores float32 and row numbers int64, `[top]` or `[q, top]`: `store.rows(numbers)` says what they are.

    Raises:
        UserError: for a query of another length, one that is all zeros or not finite, or a wrong `top` or `where`.

    Example:
        `scores, numbers = search(store, text_encoder(store)(["a red bicycle"])[0], where="year >= 2020")`
    """
    queries = _checked(store, query, top)
    rows = _selected(store, where)
    parts = [
        _nearest(store, queries[start : start + _QUERIES], top, rows) for start in range(0, len(queries), _QUERIES)
    ]
    scores, numbers = (np.concatenate(part) for part in zip(*parts, strict=True))
    return (scores[0], numbers[0]) if query.ndim == 1 else (scores, numbers)


def build_approximate(store: Store) -> None:
    """Make the approximate index of a store, in place of an older one.

    STORE/faiss-N.index is an inverted file with 8-bit codes of the first N slots, with about as many lists as the root
    of its rows. A search compares rows that were added later exactly.

    Raises:
        UserError: the store can't be written or has no rows, or faiss is missing.
    """
    faiss, rows = import_extra("faiss"), np.flatnonzero(store.alive())
    if len(rows) == 0:
        raise UserError(f"{store.folder} has no rows to make an approximate index of")
    lists = max(1, int(len(rows) ** 0.5))
    index = faiss.index_factory(store.dim, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).choice(rows, min(len(rows), _SAMPLE * lists), replace=False)
    index.train(store.embeddings[np.sort(sample)])
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        index.add_with_ids(store.embeddings[block], block)
    path = store.folder / f"faiss-{store.slots}.index"
    with writing(store.folder), replacing(path) as temporary:
        faiss.write_index(index, str(temporary))
    for other in store.folder.glob("faiss-*.index"):
        if other != path:
            other.unlink()


def search_approximate(
    store: Store, query: NDArray[np.floating[Any]], top: int = 10, where: str | None = None, *, probes: int = 32
) -> tuple[Scores, Numbers]:
    """As `search`, but some of the nearest rows may be missing.

    Args:
        store, query, top, where: as for `search`.
        probes: lists to look into; more find more and take longer. Where they have too few rows that meet the
            condition, the search is exact.

    Raises:
        UserError: there is no index, faiss is missing, or as for `search`.
    """
    if probes < 1:
        raise UserError(f"probes must be 1 or more, got {probes}")
    faiss, queries = import_extra("faiss"), _checked(store, query, top)
    path = next(store.folder.glob("faiss-*.index"), None)
    if path is None:
        raise UserError(f"{store.folder} has no approximate index of its rows: `evaclip index --approximate` makes one")
    index, covered = _loaded(path), int(path.stem.rpartition("-")[2])
    rows = _selected(store, where)
    count = store.slots if rows is None else len(rows)
    mask = np.zeros(max(covered, store.slots), np.bool_)
    mask[slice(store.slots) if rows is None else rows] = True
    bits = np.packbits(mask, bitorder="little")
    options = faiss.SearchParametersIVF(sel=faiss.IDSelectorBitmap(bits), nprobe=probes)
    _, candidates = index.search(queries, min(_SPARE * top, count) or 1, params=options)
    new = np.flatnonzero(mask[covered : store.slots]) + covered
    parts = []
    for one, found in zip(queries, candidates, strict=True):
        near = np.union1d(found[found >= 0], new)
        parts.append(_nearest(store, one[None], top, near if len(near) >= min(top, count) else rows))
    scores, numbers = (np.concatenate(part) for part in zip(*parts, strict=True))
    return (scores[0], numbers[0]) if query.ndim == 1 else (scores, numbers)


def _nearest(store: Store, queries: Scores, top: int, rows: Numbers | None) -> tuple[Scores, Numbers]:
    """The `top` nearest of these rows, None for all, and their scores, `[q, top]`."""
    count = store.slots if rows is None else len(rows)
    top = min(top, count)
    if top == 0:
        return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    # To gather many rows takes longer than to compare all of them.
    gathered = rows is not None and count < store.slots // 8
    scores = queries @ (store.embeddings[rows] if gathered else store.embeddings).T
    if rows is not None and not gathered:
        scores = scores[:, rows]
    ranked = []
    for query, score in zip(queries, scores, strict=True):
        bound = np.partition(score, count - top)[count - top]
        found = np.flatnonzero(score >= bound - _ROUNDING)
        numbers = found if rows is None else rows[found]
        # Compared again in one order of additions, so that equal rows have equal scores.
        exact = np.einsum("nd,d->n", store.embeddings[numbers], query)
        order = np.lexsort((numbers, -exact))[:top]
        ranked.append((exact[order], numbers[order]))
    return np.stack([score for score, _ in ranked]), np.stack([numbers for _, numbers in ranked])


def _checked(store: Store, query: NDArray[Any], top: int) -> Scores:
    """The queries `[q, dim]` in float32 and of length 1; raises UserError for others."""
    if query.ndim not in (1, 2) or query.shape[-1] != store.dim or 0 in query.shape:
        raise UserError(f"query must be [{store.dim}] or [q, {store.dim}], got {list(query.shape)}")
    if top < 1:
        raise UserError(f"top must be 1 or more, got {top}")
    queries = np.atleast_2d(query).astype(np.float32)
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise UserError("query must have a direction, got all zeros or values that aren't finite")
    unit: Scores = queries / lengths
    return unit


def _selected(store: Store, where: str | None) -> Numbers | None:
    """Numbers of the rows that meet a condition, in ascending order; None for all numbers, if all have rows."""
    if where is not None:
        return store.select(where)
    return np.flatnonzero(store.alive()) if len(store) < store.slots else None


@lru_cache(2)
def _loaded(path: Path) -> Any:
    with reading(path):
        return import_extra("faiss").read_index(str(path))
