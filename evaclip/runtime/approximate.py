"""An approximate index of a store: a graph of near neighbours (HNSW, Malkov and Yashunin 2016), by usearch.

The graph proposes rows, `rank` compares them again with their embeddings, and rows that were added after it was built
are compared as well. Without conditions: a graph doesn't know them.
"""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaclip.atomic import replacing, write_json, writing
from evaclip.errors import UserError
from evaclip.runtime.codes import Numbers
from evaclip.runtime.search import Scores, checked, rank, search
from evaclip.runtime.store import Store

_GRAPH, _ABOUT = "approximate-{}.usearch", "approximate.json"
_PROPOSED = 8
"""Rows that the graph proposes for each one that is asked for: in 8 bits it mistakes near ones for another."""


def build_approximate(store: Store) -> None:
    """Makes the graph of all rows that the store has now; one that was made before it is replaced.

    Raises:
        UserError: the store can't be written.
    """
    from usearch.index import Index

    graph = Index(ndim=store.dim, metric="ip", dtype="i8")
    numbers = np.flatnonzero(store.alive())
    for start in range(0, len(numbers), 65536):
        part = numbers[start : start + 65536]
        graph.add(part, store.embeddings[part].astype(np.float32))
    path = store.folder / _GRAPH.format(store.generation)
    with writing(path), replacing(path) as temporary:
        graph.save(str(temporary))
    write_json(store.folder / _ABOUT, {"generation": store.generation, "slots": store.slots})


def search_approximate(
    store: Store, query: NDArray[np.floating[Any]], top: int = 10, where: str | None = None, *, width: int = 256
) -> tuple[Scores, Numbers]:
    """As `search`, but some of the nearest rows may be missing; with a condition it is `search`.

    Args:
        store, query, top, where: as for `search`.
        width: candidates that the walk through the graph keeps: more find more, and take longer.

    Raises:
        UserError: there is no graph, or `Store.compact` has given the rows other numbers since; or as of `search`.
    """
    if where is not None:
        return search(store, query, top, where)
    queries = checked(store, query, top)
    graph, covered = _load(store)
    graph.expansion_search = max(width, _PROPOSED * top)
    alive, new = store.alive(), np.arange(covered, store.slots)
    top, ranked = min(top, len(store)), []
    for one in queries:
        proposed = np.asarray(graph.search(one, _PROPOSED * top).keys).astype(np.int64) if covered and top else new[:0]
        numbers = np.concatenate([proposed, new])
        ranked.append(rank(store, one, numbers[alive[numbers]], top))
    if query.ndim == 1:
        return ranked[0]
    return np.stack([scores for scores, _ in ranked]), np.stack([numbers for _, numbers in ranked])


def _load(store: Store) -> tuple[Any, int]:
    from usearch.index import Index

    path = store.folder / _ABOUT
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"generation": None}
    if about["generation"] != store.generation:
        raise UserError(f"{store.folder} has no approximate index of its rows: `evaclip index --approximate` makes one")
    graph = Index.restore(str(store.folder / _GRAPH.format(store.generation)), view=True)
    return graph, int(about["slots"])
