"""Embeddings in 8 bits, with the most that a score from them may be wrong by.

A vector x is turned by an orthogonal matrix, which spreads outlying coordinates over all of them and changes no
score, and rounded: Rx = scale * code + rest. What is kept of the rest is its length. For a query q, rounded as well,
the score is off by at most |Rq rounded| * |rest of x| + |x| * |rest of q| (Cauchy and Schwarz).
"""

import numpy as np
from numpy.typing import NDArray

LARGEST = 127


def random_rotation(dim: int) -> NDArray[np.float32]:
    """An orthogonal matrix, float32 `[dim, dim]`."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))
    return q.astype(np.float32)


def encode(vectors: NDArray[np.float32], rotation: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes int8 `[n, d]`, and float32 `[n, 2]`: the scale of each, and the length of what rounding took."""
    turned = vectors @ rotation
    scales = np.maximum(np.abs(turned).max(axis=1, keepdims=True), 1e-30) / LARGEST
    codes = np.rint(turned / scales)
    rests = np.linalg.norm(turned - codes * scales, axis=1, keepdims=True)
    return codes.astype(np.int8), np.concatenate([scales, rests], axis=1, dtype=np.float32)
