"""Stores of random embeddings."""

import numpy as np

from evaclip.runtime.store import Row, Store

DIM = 24


def unit(count, dim=DIM, seed=0):
    """Float32 `[count, dim]` of length 1."""
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def named(count, start=0):
    """Rows `0.jpg`, `1.jpg`, ..., of the years from 2000 on."""
    numbers = range(start, start + count)
    return [Row(f"{n}.jpg", f"{n:02x}", f"picture {n}", {"year": 2000 + n, "flag": n % 2 == 0}) for n in numbers]


def filled(folder, vectors):
    """A store of these embeddings."""
    store = Store.create(folder, {"name": "tiny", "dim": vectors.shape[1]})
    store.add(vectors, named(len(vectors)))
    return store
