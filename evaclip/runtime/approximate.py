"""An approximate index of a store: its rows in lists around centroids (inverted file; Sivic and Zisserman 2003).

A query looks into the lists whose centroids are nearest to it, as `search` looks at everything, and at the rows that
were added after the lists were made. The index has 4 bytes a row beside the centroids, and no second copy of the codes.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from evaclip.atomic import reading, replacing, write_json, writing
from evaclip.errors import UserError
from evaclip.extras import with_remedy
from evaclip.runtime.codes import Floats, Numbers
from evaclip.runtime.search import Scores, best_of, checked, rows_meeting
from evaclip.runtime.store import Store

PROBES = 32
_ABOUT = "approximate.json"
_SAMPLE, _BATCH, _EPOCHS = 64, 8192, 5
"""Rows for each centroid that these are sought among, those of a step, and passes over them."""
_BLOCK = 65536


def build_approximate(store: Store) -> None:
    """Makes the index of all rows that the store has now; one that was made before it is replaced.

    Raises:
        UserError: the store can't be written, or has no rows.
    """
    numbers = np.flatnonzero(store.alive())
    if len(numbers) == 0:
        raise UserError(f"{store.folder} has no rows to make an approximate index of")
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ModuleNotFoundError as exc:
        raise with_remedy(exc) from exc

    count = max(1, int(len(numbers) ** 0.5))
    sample = np.random.default_rng(0).choice(numbers, min(len(numbers), _SAMPLE * count), replace=False)
    means = MiniBatchKMeans(count, init="random", batch_size=_BATCH, max_iter=_EPOCHS, random_state=0, n_init=1)
    means.fit(_rows(store, np.sort(sample)))
    starts = range(0, len(numbers), _BLOCK)
    nearest = np.concatenate([means.predict(_rows(store, numbers[start : start + _BLOCK])) for start in starts])
    ends = np.cumsum(np.bincount(nearest, minlength=count))
    centroids = means.cluster_centers_.astype(np.float32)
    halves, lists = (centroids**2).sum(axis=1) / 2, numbers[np.argsort(nearest, kind="stable")]
    _Index(centroids, halves, ends, lists).save(store)


def _rows(store: Store, numbers: Numbers) -> Floats:
    rows: Floats = store.embeddings[numbers].astype(np.float32)
    return rows


def search_approximate(
    store: Store, query: NDArray[np.floating[Any]], top: int = 10, where: str | None = None, *, probes: int = PROBES
) -> tuple[Scores, Numbers]:
    """As `search`, but some of the nearest rows may be missing.

    Args:
        store, query, top, where: as for `search`.
        probes: lists to look into: more find more, and take longer. It looks into more by itself where they have
            fewer than `top` rows that meet the condition.

    Raises:
        UserError: there is no index, or `Store.compact` has given the rows other numbers since; or as of `search`.
    """
    if probes < 1:
        raise UserError(f"probes is {probes}; expected 1 or more")
    queries = checked(store, query, top)
    index, covered = _Index.load(store)
    allowed = _mask(store, where, covered)
    wanted = min(top, store.slots if allowed is None else int(allowed.sum()))
    new = np.arange(covered, store.slots)

    def near(one: Floats) -> Numbers:
        lists, looked = index.nearest(one), probes
        while True:
            rows: Numbers = np.concatenate([index.rows(lists[:looked]), new])
            rows = rows if allowed is None else rows[allowed[rows]]
            if len(rows) >= wanted:
                return rows
            looked *= 2

    found = [best_of(store, one[None], top, near(one)) for one in queries]
    scores, numbers = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return (scores[0], numbers[0]) if query.ndim == 1 else (scores, numbers)


def _mask(store: Store, where: str | None, covered: int) -> NDArray[np.bool_] | None:
    """Which rows may be found; None for all."""
    meeting = rows_meeting(store, where)
    # The index may know of rows that another process has added since the store was opened.
    if meeting is None and covered <= store.slots:
        return None
    mask = np.zeros(max(covered, store.slots), np.bool_)
    mask[slice(store.slots) if meeting is None else meeting] = True
    return mask


@dataclass(frozen=True)
class _Index:
    """Centroids float32 `[k, dim]`, half the squared length and the end of the list of each, `[k]`, and all lists."""

    centroids: Floats
    halves: Floats
    ends: Numbers
    numbers: NDArray[np.integer[Any]]

    def nearest(self, query: Floats) -> Numbers:
        """All lists, that of the nearest centroid first."""
        order: Numbers = np.argsort(self.halves - self.centroids @ query)
        return order

    def rows(self, lists: Numbers) -> Numbers:
        """The numbers of the rows in these lists."""
        parts = [self.numbers[self.ends[one - 1] if one else 0 : self.ends[one]] for one in lists]
        return np.concatenate(parts).astype(np.int64)

    def save(self, store: Store) -> None:
        """Puts it into the store's folder, in place of another one."""
        smallest = np.min_scalar_type(store.slots)
        parts = {**vars(self), "numbers": self.numbers.astype(smallest)}
        files = {kind: f"approximate-{store.generation}-{store.slots}-{kind}.npy" for kind in parts}
        with writing(store.folder):
            for kind, part in parts.items():
                with replacing(store.folder / files[kind]) as temporary, temporary.open("wb") as stream:
                    np.save(stream, part)
            # From when this is there they count.
            about = {"generation": store.generation, "slots": store.slots, "files": files}
            write_json(store.folder / _ABOUT, about)
            for path in store.folder.glob("approximate-*.npy"):
                if path.name not in files.values():
                    path.unlink()

    @classmethod
    def load(cls, store: Store) -> tuple[Self, int]:
        """The index of a store, mapped into memory, and how many of the store's numbers it covers."""
        path = store.folder / _ABOUT
        about: dict[str, Any] = {"generation": None}
        if path.is_file():
            with reading(path):
                about = json.loads(path.read_text(encoding="utf-8"))
        if about["generation"] != store.generation:
            command = "`evaclip index --approximate` makes one"
            raise UserError(f"{store.folder} has no approximate index of its rows: {command}")
        parts = {kind: _mapped(store.folder / Path(file).name) for kind, file in about["files"].items()}
        return cls(**parts), int(about["slots"])


@lru_cache(8)
def _mapped(path: Path) -> NDArray[Any]:
    # Kept, as each page that is touched for the first time costs a fault. A file of this name never changes.
    with reading(path):
        return np.asarray(np.load(path, mmap_mode="r"))
