"""Votes of the nearest neighbours, against the definition written out."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from evaclip.errors import UserError
from evaclip.eval.knn import knn


def drawn(samples: int, seed: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    return torch.eye(classes, 8)[labels] + 0.8 * torch.randn(samples, 8, generator=generator), labels


@pytest.mark.parametrize(("neighbours", "temperature"), [(20, 0.07), (3, 1.0), (1000, 0.07)])
def test_votes_are_those_of_the_definition(neighbours: int, temperature: float) -> None:
    (train, train_labels), (test, labels) = drawn(60, 0, 8), drawn(40, 1, 8)
    hits, among_five = [], []
    for query, label in zip(test.double(), labels.tolist(), strict=True):
        cosines = [float(query @ each / query.norm() / each.norm()) for each in train.double()]
        nearest = sorted(range(60), key=lambda i: -cosines[i])[:neighbours]
        votes = dict[int, float]()
        for i in nearest:
            voter = int(train_labels[i])
            votes[voter] = votes.get(voter, 0.0) + math.exp(cosines[i] / temperature)
        places = sorted(votes, key=lambda c: -votes[c])
        hits.append(places[0] == label)
        among_five.append(label in places[:5])
    found = knn((train, train_labels), (test, labels), classes=8, neighbours=neighbours, temperature=temperature)
    assert found.top1 == pytest.approx(sum(hits) / 40)
    assert found.top5 == pytest.approx(sum(among_five) / 40)
    assert 0.1 < found.top1 < found.top5 < 1.0
    assert (found.train_samples, found.samples, found.neighbours) == (60, 40, min(neighbours, 60))


def test_lengths_and_low_temperatures_change_nothing() -> None:
    (train, train_labels), test = drawn(60, 0), drawn(40, 1)
    plain = knn((train, train_labels), test, classes=5)
    scaled = knn((train * torch.rand(60, 1) * 9, train_labels), (test[0] * 7, test[1]), classes=5)
    assert scaled == plain
    nearest = knn((train, train_labels), test, classes=5, neighbours=1)
    assert knn((train, train_labels), test, classes=5, temperature=1e-6).top1 == nearest.top1


def test_of_equally_near_ones_the_earlier_votes() -> None:
    train, labels = torch.eye(3)[[0, 1, 1, 0, 1]], torch.tensor([4, 2, 3, 1, 0])
    for first in (1, 2, 4):
        order = torch.tensor([first, *(number for number in range(5) if number != first)])
        found = knn((train[order], labels[order]), (torch.eye(3)[[1]], labels[[first]]), classes=5, neighbours=1)
        assert found.top1 == 1.0


def test_blocks_are_only_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    data = drawn(60, 0), drawn(40, 1)
    whole = knn(*data, classes=5)
    sizes = list[int]()

    def over(items: Sequence[Any], action: Callable[[Any], Any]) -> list[Any]:
        found = [action(item) for item in items]
        sizes.extend(map(len, found))
        return found

    monkeypatch.setattr("evaclip.eval.knn._QUERIES", 16)
    assert knn(*data, classes=5, over=over) == whole
    assert sizes == [16, 16, 8]


def test_a_class_that_none_votes_for_is_a_miss() -> None:
    train = torch.eye(7), torch.arange(7)
    found = knn(train, (torch.eye(7)[[6, 6, 6]], torch.tensor([6, 0, 5])), classes=7, neighbours=1)
    assert found.top1 == found.top5 == pytest.approx(1 / 3)


def test_nothing_to_vote_is_refused() -> None:
    train, test = drawn(60, 0), drawn(0, 1)
    with pytest.raises(UserError, match="got 60 and 0"):
        knn(train, test, classes=5)
