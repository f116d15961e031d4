"""An approximate index of a store by faiss, for more rows than an exact search is quick with.

STORE/faiss-N.index is an inverted file with 8-bit codes of the first N slots. Rows that were added
later are compared exactly.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaclip.atomic import reading, replacing, writing
from evaclip.errors import UserError
from evaclip.extras import with_remedy
from evaclip.runtime.search import Numbers, Scores, checked, nearest, selected
from evaclip.runtime.store import Store

_SAMPLE = 64
"""Rows a list that its centroid is made of."""
_BLOCK = 65_536
_SPARE = 4
"""Rows compared again exactly, as a multiple of `top`."""


def build_approximate(store: Store) -> None:
    """Makes the index of a store, with about as many lists as the root of its rows, in place of an older one.

    Raises:
        UserError: the store can't be written or has no rows, or faiss is missing.
    """
    faiss, rows = _faiss(), np.flatnonzero(store.alive())
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
    faiss, queries = _faiss(), checked(store, query, top)
    path = next(store.folder.glob("faiss-*.index"), None)
    if path is None:
        raise UserError(f"{store.folder} has no approximate index of its rows: `evaclip index --approximate` makes one")
    index, covered = _loaded(path), int(path.stem.rpartition("-")[2])
    rows = selected(store, where)
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
        parts.append(nearest(store, one[None], top, near if len(near) >= min(top, count) else rows))
    scores, numbers = (np.concatenate(part) for part in zip(*parts, strict=True))
    return (scores[0], numbers[0]) if query.ndim == 1 else (scores, numbers)


@lru_cache(2)
def _loaded(path: Path) -> Any:
    with reading(path):
        return _faiss().read_index(str(path))


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as exc:
        raise with_remedy(exc) from exc
    return faiss
