"""Exact ranks and top-k lists between two sets of features, in blocks: memory never grows with both numbers.

Scores are computed in float64 and compared in float32, so that equal features give equal scores whatever the
block size. Of equal scores the one with the lower index comes first: a model that gives all items one score
is ranked like a fixed list, and so reaches exactly chance on average.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2048


def target_ranks(queries: Tensor, items: Tensor, targets: Tensor, *, block: int = BLOCK) -> Tensor:
    """The place (0 is best) of each query's one target among all items.

    Args:
        queries: [Q, D] features, any float dtype.
        items: [M, D] features.
        targets: [Q] int64, the index of each query's target among the items.
        block: rows and columns of the score tiles.

    Returns:
        [Q] int64: how many items score higher than the target, or equal with a lower index.
    """
    _check_features(queries, items)
    if targets.shape != queries.shape[:1]:
        raise ValueError(f"expected one target for each of {len(queries)} queries, got {tuple(targets.shape)}")
    if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= len(items)):
        raise ValueError(f"targets must lie in [0, {len(items)}), got {int(targets.min())}..{int(targets.max())}")
    ranks = torch.zeros(len(queries), dtype=torch.int64)
    for rows in _slices(len(queries), block):
        query, target = queries[rows].double(), targets[rows, None]
        target_score = (query * items[target[:, 0]].double()).sum(1, keepdim=True).float()
        for columns in _slices(len(items), block):
            scores = (query @ items[columns].double().T).float()
            index = torch.arange(columns.start, columns.stop)
            ahead = (scores > target_score) | ((scores == target_score) & (index < target))
            # Summed in another order, the target's score may differ in its last bit: it never beats itself.
            ranks[rows] += (ahead & (index != target)).sum(1)
    return ranks


def top_items(queries: Tensor, items: Tensor, k: int, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The k best items of each query, best first.

    Args:
        queries: [Q, D] features.
        items: [M, D] features.
        k: how many; no more than M are returned.
        block: rows and columns of the score tiles.

    Returns:
        (scores [Q, min(k, M)] float32, indices [Q, min(k, M)] int64)
    """
    _check_features(queries, items)
    best_scores, best_indices = [], []
    for rows in _slices(len(queries), block):
        query = queries[rows].double()
        scores = torch.empty(len(query), 0)
        indices = torch.empty(len(query), 0, dtype=torch.int64)
        for columns in _slices(len(items), block):
            tile = (query @ items[columns].double().T).float()
            scores = torch.cat([scores, tile], 1)
            indices = torch.cat([indices, torch.arange(columns.start, columns.stop).expand_as(tile)], 1)
            # Stable, and what was kept so far stands left with lower indices: ties stay in index order.
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            scores, indices = scores[:, :k], indices.gather(1, order[:, :k])
        best_scores.append(scores)
        best_indices.append(indices)
    if not best_scores:
        return torch.empty(0, min(k, len(items))), torch.empty(0, min(k, len(items)), dtype=torch.int64)
    return torch.cat(best_scores), torch.cat(best_indices)


def hit_rate(ranks: Tensor, k: int) -> float:
    """The share of ranks that lie within the first k places."""
    return float((ranks < k).double().mean())


def _slices(length: int, block: int) -> Iterator[slice]:
    for start in range(0, length, block):
        yield slice(start, min(start + block, length))


def _check_features(queries: Tensor, items: Tensor) -> None:
    if queries.ndim != 2 or items.ndim != 2 or queries.shape[1] != items.shape[1]:
        raise ValueError(f"expected features [Q, D] and [M, D], got {tuple(queries.shape)} and {tuple(items.shape)}")
    if not len(items):
        raise ValueError("there are no items to rank")
