"""Exact ranks and top-k lists between two sets of features, in blocks: memory never grows with both numbers.

Scores are computed in float64 and compared in float32, so that equal features give equal scores whatever the
block size. Of equal scores the one with the lower index comes first: a model that gives all items one score
is ranked like a fixed list, and so reaches exactly chance on average.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 2048

Over = Callable[[Sequence[Any], Callable[[Any], Any]], list[Any]]
"""(items, what is done with one) -> what comes of each, in their order; several processes may share the work."""


@dataclass(frozen=True)
class Result:
    """What an evaluation found."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON, whose keys are texts."""
        found: dict[str, Any] = _with_texts(asdict(self))
        return found


def _with_texts(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {key if isinstance(key, str) else f"{key:g}": _with_texts(value) for key, value in tree.items()}


def here(items: Sequence[Any], action: Callable[[Any], Any]) -> list[Any]:
    """In this process alone."""
    return [action(item) for item in items]


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
    best = torch.empty(len(queries), min(k, len(items)), dtype=torch.int64)
    for rows in _slices(len(queries), block):
        query = queries[rows].double()
        kept = best[rows, :0]
        for columns in _slices(len(items), block):
            tile = (query @ items[columns].double().T).float()
            kept = torch.cat([kept, _sortable(tile, columns.start)], 1)
            kept = kept.topk(min(k, kept.shape[1]), dim=1).values
        best[rows] = kept
    return _scores_of(best), _LAST - (best & _LAST)


def hit_rate(ranks: Tensor, k: int) -> float:
    """The share of ranks that lie within the first k places."""
    return float((ranks < k).double().mean())


_LAST = 2**32 - 1


def _sortable(scores: Tensor, first: int) -> Tensor:
    """Scores [n, m] of items from number `first` on, as int64 of which no two are equal: a score, then less its item.

    So a selection that promises nothing about ties has none to break; a stable sort takes longer than the products.
    """
    items = torch.arange(first, first + scores.shape[1])
    return (_ordered(scores.add(0.0).view(torch.int32)).long() << 32) + (_LAST - items)  # -0.0 becomes 0.0


def _scores_of(sortable: Tensor) -> Tensor:
    return _ordered((sortable >> 32).int()).view(torch.float32)


def _ordered(bits: Tensor) -> Tensor:
    """Bits of float32 to int32 of the same order, and back: below 0 they grow as the number falls."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _slices(length: int, block: int) -> Iterator[slice]:
    for start in range(0, length, block):
        yield slice(start, min(start + block, length))


def _check_features(queries: Tensor, items: Tensor) -> None:
    if queries.ndim != 2 or items.ndim != 2 or queries.shape[1] != items.shape[1]:
        raise ValueError(f"expected features [Q, D] and [M, D], got {tuple(queries.shape)} and {tuple(items.shape)}")
    if not len(items):
        raise ValueError("there are no items to rank")
