"""Recall and time of a search: generated embeddings in a store, exactly and by the approximate index."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import byline
from benchmarks.table import make_console, plain_table
from evaclip.runtime.search import search
from evaclip.runtime.store import Row, Store

DIM, TOP, QUERIES, BATCH = 512, 10, 50, 50_000
TOPICS, SPREAD = 300, 1.5
"""Embeddings lie around so many centres, at about this distance from them."""
DECAY = 0.5
"""The n-th direction has a share of n^-DECAY: embeddings of models don't fill their space."""
PROBES = (8, 32, 128)

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Measured:
    """Of one search: milliseconds on the clock and of all processors, medians over queries, and the least of each."""

    rows: int
    name: str
    recall: float
    wall: float
    least_wall: float
    cpu: float
    least_cpu: float


def measure(folder: Path, rows: int, approximate: bool, say: Callable[[str], None]) -> list[Measured]:
    """Fills a store in `folder` and searches it, one query at a time.

    Recall is against all scores in float32.
    """
    queries = _unit(_around(QUERIES, np.random.default_rng(1)))
    with Store.create(folder, {"name": "generated", "dim": DIM}) as store:
        began, best = time.process_time(), []
        for start in range(0, rows, BATCH):
            embeddings = _unit(_around(min(BATCH, rows - start), np.random.default_rng([2, start])))
            store.add(embeddings, [Row(f"{n}.jpg", "00") for n in range(start, start + len(embeddings))])
            best.append(_best(queries @ embeddings.T, start))
        say(f"{rows:,} rows: added and compared in {time.process_time() - began:.0f} s of processors")
        scores, numbers = (np.concatenate(parts, axis=1) for parts in zip(*best, strict=True))
        truth = np.take_along_axis(numbers, np.argsort(-scores, axis=1)[:, :TOP], axis=1)
        methods: dict[str, Callable[..., Any]] = {"exact": search}
        if approximate:
            from evaclip.runtime.approximate import build_approximate, search_approximate

            began = time.perf_counter()
            build_approximate(store)
            say(f"{rows:,} rows: approximate index in {time.perf_counter() - began:.0f} s")
            methods |= {f"approximate, {count} lists": partial(search_approximate, probes=count) for count in PROBES}
        return [_measured(name, method, store, queries, truth) for name, method in methods.items()]


def show(found: list[Measured]) -> None:
    """A table, and what it was measured on."""
    table = plain_table("search", "rows", "recall", "median", "least", "processors: median", "least")
    for row in found:
        times = (f"{value:.1f}" for value in (row.wall, row.least_wall, row.cpu, row.least_cpu))
        table.add_row(row.name, f"{row.rows:,}", f"{row.recall:.3f}", *times)
    console = make_console()
    console.print(f"The {TOP} nearest of rows of {DIM}, milliseconds a query")
    console.print(table)
    console.print(byline(torch.device("cpu")), style="dim")


def _measured(name: str, method: Callable[..., Any], store: Store, queries: Array, truth: Any) -> Measured:
    method(store, queries[0], TOP)
    wall, cpu, hits = [], [], 0
    for query, expected in zip(queries, truth, strict=True):
        began = time.perf_counter(), time.process_time()
        _, numbers = method(store, query, TOP)
        wall.append(1e3 * (time.perf_counter() - began[0]))
        cpu.append(1e3 * (time.process_time() - began[1]))
        hits += len(set(numbers.tolist()) & set(expected.tolist()))
    return Measured(len(store), name, hits / truth.size, median(wall), min(wall), median(cpu), min(cpu))


def _around(count: int, draw: np.random.Generator) -> Array:
    shares = np.arange(1, DIM + 1, dtype=np.float32) ** -DECAY
    centres = np.random.default_rng(0).standard_normal((TOPICS, DIM), dtype=np.float32)
    away = SPREAD * draw.standard_normal((count, DIM), dtype=np.float32)
    return shares * (centres[draw.integers(0, TOPICS, count)] + away)


def _unit(vectors: Array) -> Array:
    unit: Array = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _best(scores: Array, start: int) -> tuple[Array, NDArray[np.int64]]:
    numbers = np.argpartition(-scores, TOP, axis=1)[:, :TOP]
    return np.take_along_axis(scores, numbers, axis=1), numbers + start
