"""The nearest rows of a store, such as the images of `evaclip index`, to a few queries."""

import tempfile
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operation import Baseline, Cost, Draw, Function, Inputs, Operation, Work, peer, register
from benchmarks.shapes import Shape, parse_shape
from evaclip.errors import UserError
from evaclip.runtime.search import search
from evaclip.runtime.store import Row, Store

TOP, QUERIES, BLOCK = 10, 1, 50_000
TOPICS, SPREAD, DECAY = 300, 1.5, 0.5
"""Embeddings lie around so many centres; the n-th direction has a share of n^-DECAY, as in embeddings of models."""


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Unit vectors float32 `[rows, dim]`, and the same in a store on disk."""

    rows: Tensor
    store: Store
    folder: Any


def _raw(rows: int, channels: int) -> Shape:
    if rows < TOP:
        raise UserError(f"rows must be at least {TOP}, got {rows}")
    return Shape(batch=rows, width=channels)


@lru_cache(maxsize=1)
def _embeddings(rows: int, dim: int) -> Embeddings:
    folder = tempfile.TemporaryDirectory()
    store = Store.create(Path(folder.name, "store"), {"name": "generated", "dim": dim})
    blocks = []
    for start in range(0, rows, BLOCK):
        generator = torch.Generator().manual_seed(start + 1)
        blocks.append(_around(min(BLOCK, rows - start), dim, generator))
        store.add(blocks[-1].numpy(), [Row(f"{start + n}.jpg", "00") for n in range(len(blocks[-1]))])
    return Embeddings(torch.cat(blocks), store, folder)


def _around(count: int, dim: int, generator: torch.Generator) -> Tensor:
    centres = torch.randn(TOPICS, dim, generator=torch.Generator().manual_seed(0))
    away = SPREAD * torch.randn(count, dim, generator=generator)
    topics = torch.randint(TOPICS, (count,), generator=generator)
    return F.normalize(torch.arange(1, dim + 1) ** -DECAY * (centres[topics] + away), dim=-1)


def _inputs(shape: Shape, draw: Draw) -> Inputs:
    queries = _around(QUERIES, shape.width, draw.generator).to(draw.dtype)
    return {"embeddings": _embeddings(shape.batch, shape.width), "queries": queries}


def _eager(embeddings: Embeddings, queries: Tensor) -> Tensor:
    """All scores, then the largest, in float32 at least."""
    wide = F.normalize(queries.to(torch.promote_types(queries.dtype, torch.float32)), dim=-1)
    parts = embeddings.rows.split(BLOCK) if wide.dtype == torch.float64 else (embeddings.rows,)
    return torch.cat([wide @ part.to(wide.dtype).T for part in parts], 1).topk(TOP).values


def _ours(embeddings: Embeddings, queries: Tensor) -> Tensor:
    return torch.from_numpy(search(embeddings.store, queries.float().numpy(), TOP)[0])


def _work(shape: Shape, itemsize: int) -> Work:
    """One product of the queries with all rows, which are float32."""
    return Work(Cost(2 * QUERIES * shape.batch * shape.width, 4 * shape.batch * shape.width))


register(
    Operation(
        name="search",
        summary=f"scores of the {TOP} nearest rows of a store",
        inputs=_inputs,
        eager=_eager,
        ours=_ours,
        baseline=Baseline("torch product and topk", "torch"),
        work=_work,
        shapes={"cpu": ("10000x512", "1000000x512")},
        parse=parse_shape,
        raw=_raw,
        small="64x16",
        by_request=True,
        references=False,
        compiles=False,
    )
)


@peer("search", package="faiss-cpu", devices=("cpu",))
def faiss(shape: Shape) -> Function:
    """faiss' exact index of inner products."""
    import faiss

    @cache
    def index() -> Any:
        flat = faiss.IndexFlatIP(shape.width)
        flat.add(_embeddings(shape.batch, shape.width).rows.numpy())
        return flat

    def nearest(embeddings: Embeddings, queries: Tensor) -> Tensor:
        scores: np.ndarray = index().search(F.normalize(queries.float(), dim=-1).numpy(), TOP)[0]
        return torch.from_numpy(scores)

    return nearest
