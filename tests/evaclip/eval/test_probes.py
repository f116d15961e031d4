"""k nearest neighbours against the definition written out, and linear probes."""

import math

import pytest
import torch
from torch import Tensor

from evaclip.errors import UserError
from evaclip.eval.probes import STRENGTHS, knn, linear_probe


def draw(samples: int, seed: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    return torch.eye(classes, 8)[labels] + 0.8 * torch.randn(samples, 8, generator=generator), labels


@pytest.mark.parametrize(("neighbours", "temperature"), [(20, 0.07), (3, 1.0), (1000, 0.07)])
def test_knn_matches_definition(neighbours: int, temperature: float) -> None:
    (train, train_labels), (test, labels) = draw(60, 0, 8), draw(40, 1, 8)
    hits, among_five = [], []
    for query, label in zip(test.double(), labels.tolist(), strict=True):
        cosines = [float(query @ each / query.norm() / each.norm()) for each in train.double()]
        nearest = sorted(range(60), key=lambda i: -cosines[i])[:neighbours]
        votes = dict[int, float]()
        for i in nearest:
            voter = int(train_labels[i])
            votes[voter] = votes.get(voter, 0.0) + math.exp(cosines[i] / temperature)
        order = sorted(votes, key=lambda c: -votes[c])
        hits.append(order[0] == label)
        among_five.append(label in order[:5])
    result = knn((train, train_labels), (test, labels), classes=8, neighbours=neighbours, temperature=temperature)
    assert result.top1 == pytest.approx(sum(hits) / 40)
    assert result.top5 == pytest.approx(sum(among_five) / 40)
    assert 0.1 < result.top1 < result.top5 < 1.0
    assert (result.train_samples, result.samples, result.neighbours) == (60, 40, min(neighbours, 60))


def test_knn_tie_goes_to_earlier_sample() -> None:
    train, labels = torch.eye(3)[[0, 1, 1, 0, 1]], torch.tensor([4, 2, 3, 1, 0])
    for first in (1, 2, 4):
        order = torch.tensor([first, *(number for number in range(5) if number != first)])
        result = knn((train[order], labels[order]), (torch.eye(3)[[1]], labels[[first]]), classes=5, neighbours=1)
        assert result.top1 == 1.0


def clusters(samples: int, classes: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    features = torch.eye(classes, 12)[labels] + noise * torch.randn(samples, 12, generator=generator)
    return torch.nn.functional.normalize(features, dim=-1), labels


def test_linear_probe_chooses_strength_on_held_out() -> None:
    train = clusters(120, 4, 0.45, 0)
    result = linear_probe(train, clusters(40, 4, 0.1, 1), classes=4)
    assert (result.train_samples, result.samples, result.chance_top1) == (120, 40, 1 / 4)
    assert result.top1 == result.mean_per_class == result.top5 == 1.0
    assert set(result.held_out) == set(STRENGTHS)
    assert result.held_out[result.strength] == max(result.held_out.values())
    other_test = linear_probe(train, clusters(40, 4, 2.0, 2), classes=4)
    assert (other_test.strength, other_test.held_out) == (result.strength, result.held_out)
    assert other_test.top1 < result.top1


def test_linear_probe_does_not_fit_held_out() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 80, generator=generator), torch.randint(2, (60,), generator=generator)
    assert max(linear_probe(noise, noise, classes=2).held_out.values()) < 0.9


def test_linear_probe_too_little_data() -> None:
    features, labels = clusters(20, 2, 0.1, 0)
    # One image of the second class, in the held-out part.
    lone = torch.zeros(20, dtype=torch.int64)
    lone[torch.randperm(20, generator=torch.Generator().manual_seed(0))[0]] = 1
    with pytest.raises(UserError, match="got 1 and 20"):
        linear_probe((features, lone), (features, labels), classes=2)
    with pytest.raises(UserError, match="to test on"):
        linear_probe((features, labels), (features[:0], labels[:0]), classes=2)
