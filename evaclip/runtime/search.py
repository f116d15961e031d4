"""The rows of a store that are nearest to a query: exact cosines with every row."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaclip.errors import UserError
from evaclip.runtime.store import Store

Scores = NDArray[np.float32]
Numbers = NDArray[np.int64]

_QUERIES = 16
"""Queries that are compared at once, which bounds the memory of their scores."""
_ROUNDING = 1e-5
"""More than float32 cosines are wrong by, whatever the order of the additions."""


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
    queries = checked(store, query, top)
    rows = selected(store, where)
    parts = [nearest(store, queries[start : start + _QUERIES], top, rows) for start in range(0, len(queries), _QUERIES)]
    scores, numbers = (np.concatenate(part) for part in zip(*parts, strict=True))
    return (scores[0], numbers[0]) if query.ndim == 1 else (scores, numbers)


def nearest(store: Store, queries: Scores, top: int, rows: Numbers | None) -> tuple[Scores, Numbers]:
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


def checked(store: Store, query: NDArray[Any], top: int) -> Scores:
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


def selected(store: Store, where: str | None) -> Numbers | None:
    """Numbers of the rows that meet a condition, in ascending order; None for all numbers, if all have rows."""
    if where is not None:
        return store.select(where)
    return np.flatnonzero(store.alive()) if len(store) < store.slots else None
