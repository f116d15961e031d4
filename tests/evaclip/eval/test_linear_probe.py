import pytest
import torch

from evaclip.errors import UserError
from evaclip.eval.linear_probe import STRENGTHS, linear_probe


def clusters(samples: int, classes: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    features = torch.eye(classes, 12)[labels] + noise * torch.randn(samples, 12, generator=generator)
    return torch.nn.functional.normalize(features, dim=-1), labels


def test_separable_classes_are_learnt() -> None:
    result = linear_probe(clusters(90, 3, 0.1, 0), clusters(30, 3, 0.1, 1), classes=3)
    assert result.top1 == result.mean_per_class == 1.0
    assert result.top5 == 1.0
    assert (result.train_samples, result.samples, result.chance_top1) == (90, 30, 1 / 3)


def test_the_strength_is_the_best_on_held_out_data_alone() -> None:
    train = clusters(120, 4, 0.45, 0)
    result = linear_probe(train, clusters(40, 4, 0.45, 1), classes=4)
    assert set(result.held_out) == set(STRENGTHS)
    assert result.held_out[result.strength] == max(result.held_out.values())
    other_test = linear_probe(train, clusters(40, 4, 2.0, 2), classes=4)
    assert (other_test.strength, other_test.held_out) == (result.strength, result.held_out)
    assert other_test.top1 < result.top1


def test_held_out_data_takes_no_part_in_the_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 80, generator=generator), torch.randint(2, (60,), generator=generator)
    assert max(linear_probe(noise, noise, classes=2).held_out.values()) < 0.9


def test_two_classes_and_a_class_never_trained_on() -> None:
    features, labels = clusters(40, 2, 0.1, 0)
    unseen = torch.nn.functional.normalize(torch.eye(3, 12)[2:], dim=-1)
    test = (torch.cat([features[:4], unseen]), torch.cat([labels[:4], torch.tensor([2])]))
    result = linear_probe((features, labels), test, classes=3)
    assert result.top1 == 4 / 5
    assert result.mean_per_class == pytest.approx(2 / 3)


def test_too_little_data_is_told() -> None:
    features, labels = clusters(20, 2, 0.1, 0)
    with pytest.raises(UserError, match="got 1 and 20"):
        linear_probe((features, labels * 0), (features, labels), classes=2)
    # One picture of the second class, among those on which the strength is chosen.
    lone = torch.zeros(20, dtype=torch.int64)
    lone[torch.randperm(20, generator=torch.Generator().manual_seed(0))[0]] = 1
    with pytest.raises(UserError, match="got 1 and 20"):
        linear_probe((features, lone), (features, labels), classes=2)
    with pytest.raises(UserError, match="to test on"):
        linear_probe((features, labels), (features[:0], labels[:0]), classes=2)
