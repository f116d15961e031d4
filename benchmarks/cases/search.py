"""The nearest rows of a store, such as the images of `evaclip index`, to a few queries."""

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, Work, peer, register
from benchmarks.shapes import Shape
from evaclip.runtime.search import search
from evaclip.runtime.store import Row, Store

TOP, BLOCK = 10, 50_000
TOPICS, SPREAD, DECAY = 300, 1.5, 0.5
"""Embeddings spread around `TOPICS` centres; direction n has a scale of n^-DECAY, as in embeddings of models."""

Embeddings = tuple[Tensor, Store, Any]
"""Unit vectors float32 `[rows, dim]`, the same in a store, and the temporary folder of the store."""


@lru_cache(maxsize=1)
def _embeddings(rows: int, dim: int) -> Embeddings:
    folder = tempfile.TemporaryDirectory()
    store = Store.create(Path(folder.name, "store"), {"name": "generated", "dim": dim})
    blocks = []
    for start in range(0, rows, BLOCK):
        generator = torch.Generator().manual_seed(start + 1)
        blocks.append(_around(min(BLOCK, rows - start), dim, generator))
        store.add(blocks[-1].numpy(), [Row(f"{start + n}.jpg", "00") for n in range(len(blocks[-1]))])
    return torch.cat(blocks), store, folder


def _around(count: int, dim: int, generator: torch.Generator) -> Tensor:
    centres = torch.randn(TOPICS, dim, generator=torch.Generator().manual_seed(0))
    away = SPREAD * torch.randn(count, dim, generator=generator)
    topics = torch.randint(TOPICS, (count,), generator=generator)
    return F.normalize(torch.arange(1, dim + 1) ** -DECAY * (centres[topics] + away), dim=-1)


def _inputs(shape: Shape, draw: Draw) -> Inputs:
    queries = _around(1, shape.width, draw.generator).to(draw.dtype)
    return {"embeddings": _embeddings(shape.batch, shape.width), "queries": queries}


def _eager(embeddings: Embeddings, queries: Tensor) -> Tensor:
    """All scores, then the largest, in float32 at least."""
    wide = F.normalize(queries.to(torch.promote_types(queries.dtype, torch.float32)), dim=-1)
    rows = embeddings[0].to(wide.dtype)
    return (wide @ rows.T).topk(min(TOP, len(rows))).values


def _ours(embeddings: Embeddings, queries: Tensor) -> Tensor:
    return torch.from_numpy(search(embeddings[1], queries.float().numpy(), TOP)[0])


def _work(shape: Shape, itemsize: int) -> Work:
    """One product of the query with all rows, which are float32."""
    return Work(Cost(2 * shape.batch * shape.width, 4 * shape.batch * shape.width))


register(
    Operation(
        name="search",
        summary=f"scores of the {TOP} nearest rows of a store",
        inputs=_inputs,
        eager=_eager,
        ours=_ours,
        baseline="torch product and topk",
        work=_work,
        shapes={"cpu": ("10000x512", "1000000x512")},
        raw=lambda rows, channels: Shape(batch=rows, width=channels),
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

    index = faiss.IndexFlatIP(shape.width)
    index.add(_embeddings(shape.batch, shape.width)[0].numpy())
    return lambda embeddings, queries: torch.from_numpy(
        index.search(F.normalize(queries.float(), dim=-1).numpy(), TOP)[0]
    )
