import pytest
import torch

from evaclip.eval.ranking import hit_rate, target_ranks, top_items


def features(rows: int, dim: int, seed: int) -> torch.Tensor:
    values = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


def brute_force_order(queries: torch.Tensor, items: torch.Tensor) -> list[list[int]]:
    scores = (queries.double() @ items.double().T).float().tolist()
    return [sorted(range(len(row)), key=lambda index: (-row[index], index)) for row in scores]


@pytest.mark.parametrize("block", [1, 7, 64])
def test_target_ranks_match_sort(block: int) -> None:
    """Of distinct items, and of items that occur three times."""
    distinct = features(41, 5, 1)
    repeated = features(4, 777, 2).repeat_interleave(3, 0)[torch.tensor([0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11])]
    for queries, items in ((features(23, 5, 0), distinct), (repeated + 0.01 * features(12, 777, 3), repeated)):
        targets = torch.arange(len(queries)) * len(items) // len(queries)
        orders = brute_force_order(queries, items)
        expected = [order.index(target) for order, target in zip(orders, targets.tolist(), strict=True)]
        assert target_ranks(queries, items, targets, block=block).tolist() == expected


def test_target_never_beats_itself_by_rounding() -> None:
    for seed in range(20):
        # Large and small numbers that cancel: each order of addition gives another sum.
        half = features(1, 150, seed) * 10.0 ** (torch.arange(150) * 37 % 30)
        item = torch.cat([half, -half.flip(1)], 1)
        assert target_ranks(torch.ones(1, 300), item, torch.tensor([0])).tolist() == [0]


def test_equal_features_reach_chance() -> None:
    same = torch.ones(40, 8)
    ranks = target_ranks(same, same, torch.arange(40))
    assert ranks.tolist() == list(range(40))
    assert hit_rate(ranks, 1) == 1 / 40


@pytest.mark.parametrize(("block", "k"), [(2, 6), (9, 60), (50, 100)])
def test_top_items_match_sort(block: int, k: int) -> None:
    """Scores of both signs, and zeros of both: each twice."""
    queries, items = features(11, 4, 4), features(30, 4, 5).repeat(2, 1)
    queries[3] = torch.tensor([-1.0, 0.0, 0.0, 0.0])
    items[[1, 31, 8, 38], 0] = torch.tensor([0.0, 0.0, -0.0, -0.0])
    scores, indices = top_items(queries, items, k, block=block)
    assert indices.tolist() == [order[:k] for order in brute_force_order(queries, items)]
    assert torch.equal(scores, (queries.double() @ items.double().T).float().gather(1, indices))


def test_target_ranks_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"got \(3, 4\) and \(2, 5\)"):
        target_ranks(torch.ones(3, 4), torch.ones(2, 5), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[0, 2\), got 0\.\.2"):
        target_ranks(torch.ones(3, 4), torch.ones(2, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="one target for each of 3 queries"):
        target_ranks(torch.ones(3, 4), torch.ones(2, 4), torch.tensor([0, 1]))
