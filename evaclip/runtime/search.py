"""The rows of a store that are nearest to a query: exactly, with one pass over 8 bits a coordinate.

All codes are compared with the query's. Which rows can be among the nearest is known from what their scores may be
wrong by (`codes.py`); these alone are compared again, in float32 with their float16 embeddings.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaclip.errors import UserError
from evaclip.runtime.codes import encode
from evaclip.runtime.store import Store

Scores = NDArray[np.float32]
Numbers = NDArray[np.int64]

_BLOCK = 8192
"""Rows compared at a time: a block's scores stay in the cache."""
_LONGEST = 1.02
"""An embedding in a store is at most so long."""
_ROUNDING = 1e-5
"""More than the sums of a score in float32 are wrong by."""


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
    mask = _mask(store, where)
    count = len(store) if mask is None else int(mask.sum())
    top = min(top, count)
    found = _Scan(store, queries, top, mask).run() if top else [np.empty(0, np.int64)] * len(queries)
    ranked = [rank(store, one, numbers, top) for one, numbers in zip(queries, found, strict=True)]
    scores, numbers = np.stack([pair[0] for pair in ranked]), np.stack([pair[1] for pair in ranked])
    return (scores[0], numbers[0]) if query.ndim == 1 else (scores, numbers)


def rank(store: Store, query: Scores, numbers: Numbers, top: int) -> tuple[Scores, Numbers]:
    """The `top` best of these rows by their float16 embeddings, and their scores."""
    scores = np.empty(len(numbers), np.float32)
    for start in range(0, len(numbers), 65536):
        part = slice(start, start + 65536)
        scores[part] = store.embeddings[numbers[part]].astype(np.float32) @ query
    order = np.lexsort((numbers, -scores))[:top]
    return scores[order], numbers[order]


class _Scan:
    """One pass over the codes, for all queries at once."""

    def __init__(self, store: Store, queries: Scores, top: int, mask: NDArray[np.bool_] | None) -> None:
        self.codes, self.scales, self.mask, self.top = store.codes, store.scales, mask, top
        self.queries, scales = encode(queries, store.rotation)
        self.factors, rests = scales[:, 0], scales[:, 1]
        lengths = np.linalg.norm(self.queries * self.factors[:, None], axis=1)
        worst = float(self.scales[:, 1].max())
        self.errors = lengths * worst + _LONGEST * rests + _ROUNDING

    def run(self) -> list[Numbers]:
        """Of each query the rows that can be among its `top` nearest."""
        threads = min(_processors(), -(-len(self.codes) // _BLOCK))
        edges = np.linspace(0, len(self.codes), threads + 1).astype(int)
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(self._range, edges[:-1], edges[1:]))
        return [
            self._possible(one, *(np.concatenate(both) for both in zip(*of_one, strict=True)))[1]
            for one, of_one in enumerate(zip(*parts, strict=True))
        ]

    def _range(self, start: int, stop: int) -> list[tuple[Scores, Numbers]]:
        kept = [(np.empty(0, np.float32), np.empty(0, np.int64)) for _ in self.queries]
        for first in range(start, stop, _BLOCK):
            part = slice(first, min(first + _BLOCK, stop))
            for one, scores in enumerate(self._scores(part)):
                kept[one] = self._merged(one, kept[one], scores, first)
        return kept

    def _scores(self, part: slice) -> Scores:
        from numkong import cdist  # of an extra

        products = np.asarray(cdist(self.queries, self.codes[part], "dot", out_dtype="float32"))
        scores = products * self.scales[part, 0] * self.factors[:, None]
        if self.mask is not None:
            scores[:, ~self.mask[part]] = -np.inf
        return scores

    def _merged(self, one: int, kept: tuple[Scores, Numbers], scores: Scores, first: int) -> tuple[Scores, Numbers]:
        if len(kept[0]) >= self.top:
            new = np.flatnonzero(scores >= self._bound(one, kept[0]))
        else:
            new = np.flatnonzero(scores > -np.inf)
        if len(new) == 0:
            return kept
        joined = np.concatenate([kept[0], scores[new]]), np.concatenate([kept[1], new + first])
        return self._possible(one, *joined)

    def _possible(self, one: int, scores: Scores, numbers: Numbers) -> tuple[Scores, Numbers]:
        if len(scores) <= self.top:
            return scores, numbers
        stay = scores >= self._bound(one, scores)
        return scores[stay], numbers[stay]

    def _bound(self, one: int, scores: Scores) -> float:
        """What a score must reach: the `top`-th best may be too high by the error, and it too low."""
        least = np.partition(scores, len(scores) - self.top)[len(scores) - self.top]
        return float(least - 2 * self.errors[one])


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


def _mask(store: Store, where: str | None) -> NDArray[np.bool_] | None:
    if where is None:
        return store.alive() if len(store) < store.slots else None
    mask = np.zeros(store.slots, np.bool_)
    mask[store.select(where)] = True
    return mask & store.alive()


def _processors() -> int:
    return len(os.sched_getaffinity(0))
