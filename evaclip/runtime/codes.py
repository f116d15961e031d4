"""Embeddings in 8 bits, with the most that a score from them may be wrong by.

A vector x is turned by an orthogonal matrix, which spreads outlying coordinates over all of them and changes no
score, and rounded: Rx = factor * code + rest. What is kept of the rest is its length. For a query q, rounded as well
but to 16 bits, the score is off by at most |Rq rounded| * |rest of x| + |x| * |rest of q| (Cauchy and Schwarz).
"""

import importlib
import os
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 127
_LARGEST_SUM = 2**31 - 1
_LONGEST = 1.02
"""An embedding in a store is at most so long."""
_ROUNDING = 1e-5
"""More than the sums of a score in float32 are wrong by."""
_BLOCK = 8192

Codes = NDArray[np.int8]
Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]


def random_rotation(dim: int) -> Floats:
    """An orthogonal matrix, float32 `[dim, dim]`."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))
    return q.astype(np.float32)


def encode(vectors: Floats, rotation: Floats) -> tuple[Codes, Floats]:
    """Codes int8 `[n, d]`, and float32 `[n, 2]`: the factor of each, and the length of what rounding took."""
    codes, factors, rests = _rounded(vectors @ rotation, LARGEST)
    return codes.astype(np.int8), np.concatenate([factors, rests], axis=1, dtype=np.float32)


def encode_queries(queries: Floats, rotation: Floats) -> tuple[NDArray[np.int16], Floats]:
    """Codes int16 `[q, d]`, and float32 `[q, 3]`.

    These are the factor of each, the length of what it stands for, and how wrong any score is for its rounding.
    """
    # No sum of products with codes of 8 bits is more than 32 bits hold.
    codes, factors, rests = _rounded(queries @ rotation, min(2**15 - 1, _LARGEST_SUM // (LARGEST * len(rotation))))
    lengths = np.linalg.norm(codes * factors, axis=1, keepdims=True)
    about = np.concatenate([factors, lengths, _LONGEST * rests + _ROUNDING], axis=1, dtype=np.float32)
    return codes.astype(np.int16), about


def possible(
    codes: Codes, about: Floats, queries: NDArray[np.int16], about_queries: Floats, top: int, numbers: Numbers | None
) -> list[Numbers]:
    """Of each query the rows, in ascending order, that can be among its `top` nearest by these bounds.

    Args:
        codes, about: int8 `[n, d]` and float32 `[n, 2]`, as `encode` gives them.
        queries, about_queries: int16 `[q, d]` and float32 `[q, 3]`, as `encode_queries` gives them.
        top: 1 or more, and no more than are compared.
        numbers: int64 `[m]`, the rows to compare, none twice; None for all.
    """
    compiled = _compiled()
    if compiled is None:
        warnings.warn("evakernels is installed without compiled code: searches take many times as long", stacklevel=2)
        return _possible(codes, about, queries, about_queries, top, numbers)
    found: list[Numbers] = compiled.possible(
        codes, about, queries, about_queries, top, numbers, len(os.sched_getaffinity(0))
    )
    return found


def _possible(
    codes: Codes, about: Floats, queries: NDArray[np.int16], about_queries: Floats, top: int, numbers: Numbers | None
) -> list[Numbers]:
    numbers = np.arange(len(codes)) if numbers is None else numbers
    factors, rests = about[numbers].T
    found = []
    for query, (factor, length, error) in zip(queries.astype(np.float64), about_queries, strict=True):
        blocks = (numbers[start : start + _BLOCK] for start in range(0, len(numbers), _BLOCK))
        scores = np.concatenate([codes[block].astype(np.float64) @ query for block in blocks]) * factors * factor
        errors = rests * length + error
        bound = np.partition(scores - errors, len(scores) - top)[len(scores) - top]
        found.append(np.sort(numbers[scores + errors >= bound]))
    return found


def _compiled() -> Any:
    try:
        return importlib.import_module("evaclip.runtime._scan")
    except ImportError:
        return None


def _rounded(vectors: Floats, largest: int) -> tuple[Floats, Floats, Floats]:
    """Whole numbers of at most this size, their factors and the lengths of what is lost, `[n, 1]` each."""
    factors = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), 1e-30) / largest
    codes: Floats = np.rint(vectors / factors)
    return codes, factors, np.linalg.norm(vectors - codes * factors, axis=1, keepdims=True)
