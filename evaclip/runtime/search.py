"""The rows of a store that are nearest to a query: exactly, with one pass over 8 bits a coordinate.

All codes are compared with the query's. Which rows can be among the nearest is known from what their scores may be
wrong by (`codes.py`); these alone are compared again, in float32 with their float16 embeddings.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaclip.errors import UserError
from evaclip.runtime.codes import Numbers, encode_queries, possible
from evaclip.runtime.store import Store

Scores = NDArray[np.float32]


def search(
    store: Store, query: NDArray[np.floating[Any]], top: int = 10, where: str | None = None
) -> tuple[Scores, Numbers]:
    """The nearest rows and their cosines, the best first; of equal ones the lower number first.

    Args:
        query: float `[dim]` or `[q, dim]`, of any length but 0.
        top: how many of each; fewer come where the store, or what meets the condition, has fewer.
        where: a condition on the rows, see `where.as_sql`.

    Returns:
        scores float32 and row numbers int64, `[top]` or `[q, top]`: `store.rows(numbers)` says what they are.

    Raises:
        UserError: for a query of another length, one that is all zeros or not finite, or a wrong `top` or `where`.

    Example:
        `scores, numbers = search(store, text_encoder(store)(["a red bicycle"])[0], where="year>=2020")`
    """
    queries = checked(store, query, top)
    scores, numbers = best_of(store, queries, top, rows_meeting(store, where))
    return (scores[0], numbers[0]) if query.ndim == 1 else (scores, numbers)


def best_of(store: Store, queries: Scores, top: int, rows: Numbers | None) -> tuple[Scores, Numbers]:
    """The `top` nearest of these rows, None for all, and their scores, `[q, top]`."""
    top = min(top, store.slots if rows is None else len(rows))
    if top == 0:
        return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    found = possible(store.codes, store.scales, *encode_queries(queries, store.rotation), top, rows)
    ranked = [_rank(store, one, numbers, top) for one, numbers in zip(queries, found, strict=True)]
    return np.stack([scores for scores, _ in ranked]), np.stack([numbers for _, numbers in ranked])


def _rank(store: Store, query: Scores, numbers: Numbers, top: int) -> tuple[Scores, Numbers]:
    """The `top` best of these rows by their float16 embeddings, and their scores."""
    scores = np.empty(len(numbers), np.float32)
    for start in range(0, len(numbers), 65536):
        part = slice(start, start + 65536)
        scores[part] = store.embeddings[numbers[part]].astype(np.float32) @ query
    order = np.lexsort((numbers, -scores))[:top]
    return scores[order], numbers[order]


def checked(store: Store, query: NDArray[Any], top: int) -> Scores:
    """The queries `[q, dim]` in float32 and of length 1; raises UserError for what is none."""
    if query.ndim not in (1, 2) or query.shape[-1] != store.dim or 0 in query.shape:
        raise UserError(f"a query is {list(query.shape)}; expected [{store.dim}] or [q, {store.dim}]")
    if top < 1:
        raise UserError(f"top is {top}; expected 1 or more")
    queries = np.atleast_2d(query).astype(np.float32)
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise UserError("a query has no direction: it is all zeros, or has values that aren't finite")
    unit: Scores = queries / lengths
    return unit


def rows_meeting(store: Store, where: str | None) -> Numbers | None:
    """Numbers of the rows that meet a condition, in ascending order; None for all numbers, if none of them is free."""
    if where is not None:
        return store.select(where)
    return np.flatnonzero(store.alive()) if len(store) < store.slots else None
