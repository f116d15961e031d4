"""Exact ranks and top-k lists between two sets of features, in blocks of bounded memory.

Scores are computed in float64 and compared in float32, so that equal features give equal scores whatever the
block size. Of equal scores the one with the lower index comes first: a model that gives all items one score
is ranked like a fixed list, and so reaches exactly chance on average.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 2048

Over = Callable[[Sequence[Any], Callable[[Any], Any]], list[Any]]
"""`(items, function) -> [function(item), ...]` in order; several ranks may share the work."""
_LAST = 2**32 - 1


@dataclass(frozen=True)
class Result:
    """Result of an evaluation."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with strings as keys."""
        content: dict[str, Any] = _with_string_keys(asdict(self))
        return content


def _with_string_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {key if isinstance(key, str) else f"{key:g}": _with_string_keys(value) for key, value in tree.items()}


def map_locally(items: Sequence[Any], function: Callable[[Any], Any]) -> list[Any]:
    """Map in this process alone, see `Over`."""
    return [function(item) for item in items]


def target_ranks(
    queries: Tensor, items: Tensor, targets: Tensor, *, block: int = BLOCK, over: Over = map_locally
) -> Tensor:
    """Rank (0 is best) of each query's one target among all items.

    Args:
        queries: [Q, D] features, any float dtype.
        items: [M, D] features.
        targets: [Q] int64, the index of each query's target among the items.
        block: rows and columns of the score tiles.
        over: maps a function over the blocks of queries.

    Returns:
        [Q] int64: number of items that score higher than the target, or equal with a lower index.
    """
    _check_features(queries, items)
    if targets.shape != queries.shape[:1]:
        raise ValueError(f"expected one target for each of {len(queries)} queries, got {tuple(targets.shape)}")
    if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= len(items)):
        raise ValueError(f"targets must lie in [0, {len(items)}), got {int(targets.min())}..{int(targets.max())}")

    def ranks_from(row: int) -> Tensor:
        query, target = queries[row : row + block].double(), targets[row : row + block, None]
        target_score = (query * items[target[:, 0]].double()).sum(1, keepdim=True).float()
        ranks = torch.zeros(len(query), dtype=torch.int64)
        for column in range(0, len(items), block):
            scores = (query @ items[column : column + block].double().T).float()
            index = torch.arange(column, column + scores.shape[1])
            first = (scores > target_score) | ((scores == target_score) & (index < target))
            # Summed in another order, the target's score may differ in its last bit: it never beats itself.
            ranks += (first & (index != target)).sum(1)
        return ranks

    return torch.cat(over(range(0, max(1, len(queries)), block), ranks_from))


def top_items(queries: Tensor, items: Tensor, k: int, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The k best items of each query, best first.

    Args:
        queries: [Q, D] features.
        items: [M, D] features.
        k: number of items; at most M are returned.
        block: rows and columns of the score tiles.

    Returns:
        (scores [Q, min(k, M)] float32, indices [Q, min(k, M)] int64)
    """
    _check_features(queries, items)
    best = torch.empty(len(queries), min(k, len(items)), dtype=torch.int64)
    for row in range(0, len(queries), block):
        query = queries[row : row + block].double()
        candidates = best[row : row + block, :0]
        for column in range(0, len(items), block):
            tile = (query @ items[column : column + block].double().T).float()
            candidates = torch.cat([candidates, _sortable(tile, column)], 1)
            candidates = candidates.topk(min(k, candidates.shape[1]), dim=1).values
        best[row : row + block] = candidates
    return _ordered((best >> 32).int()).view(torch.float32), _LAST - (best & _LAST)


def hit_rate(ranks: Tensor, k: int) -> float:
    """The share of ranks below k."""
    return float((ranks < k).double().mean())


def _sortable(scores: Tensor, first: int) -> Tensor:
    """Scores `[n, m]` of items from index `first` on, as distinct int64: the score, then the negative index.

    Distinct keys leave `topk` no ties, about which it promises nothing; a stable sort takes longer than the matmul.
    """
    items = torch.arange(first, first + scores.shape[1])
    return (_ordered(scores.add(0.0).view(torch.int32)).long() << 32) + (_LAST - items)  # -0.0 becomes 0.0


def _ordered(bits: Tensor) -> Tensor:
    """Bits of float32 to int32 of the same order, and back: below 0 they grow as the number falls."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _check_features(queries: Tensor, items: Tensor) -> None:
    if queries.ndim != 2 or items.ndim != 2 or queries.shape[1] != items.shape[1]:
        raise ValueError(f"expected features [Q, D] and [M, D], got {tuple(queries.shape)} and {tuple(items.shape)}")
    if not len(items):
        raise ValueError("there are no items to rank")
