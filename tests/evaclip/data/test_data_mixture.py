"""Several data sets in given proportions, with one position."""

from collections import Counter

import numpy as np
import pytest
from data_samples import number_tokens, number_transform

from evaclip.data import DataConfig, TrainLoader, open_configured
from evaclip.data.config import PartConfig
from evaclip.data.mixture import MixtureSource, counts_of
from evaclip.data.order import mix
from evaclip.data.synthetic import SyntheticSource
from evaclip.errors import UserError

SIZES = (70, 40, 30)
WEIGHTS = (6.0, 3.0, 1.0)


def mixture(weights=WEIGHTS, sizes=SIZES) -> MixtureSource:
    return MixtureSource([SyntheticSource(size) for size in sizes], weights)


def drawn(count: int, seed: int = 0, start: int = 0) -> np.ndarray:
    return mixture().order(seed, 0).indices(np.arange(start, start + count))


def parts(samples: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(SIZES), samples, side="right")


def test_mixture_proportions_are_exact_everywhere():
    chosen = parts(drawn(4000))
    for period in chosen.reshape(4, 1000):
        assert np.bincount(period).tolist() == [600, 300, 100]
    for stretch in chosen.reshape(40, 100):
        assert np.all(np.bincount(stretch, minlength=3) > 0)


def test_mixture_parts_have_their_own_epochs():
    samples = drawn(4000)
    for number, size in enumerate(SIZES):
        own = samples[parts(samples) == number]
        whole = own[: len(own) // size * size].reshape(-1, size)
        assert len(whole) >= 10
        assert all(len(set(epoch)) == size for epoch in whole)


def test_mixture_position_does_not_depend_on_the_start():
    samples = drawn(3000)
    assert np.array_equal(drawn(700, start=1650), samples[1650:2350])
    assert not np.array_equal(drawn(3000, seed=1), samples)


def test_mixture_order_is_that_of_published_runs():
    indices = np.array([5000, 3, 999, 1000, 10**12 + 7, 3, 2500])
    assert mixture().order(0, 0).indices(indices).tolist() == [27, 58, 115, 20, 62, 58, 92]


def test_mixture_order_hashes_all_periods_at_once(monkeypatch):
    """A pass over the batch for each of its periods would take quadratic time."""
    calls = Counter()

    def counted(seed, *values):
        calls["mix"] += 1
        return mix(seed, *values)

    monkeypatch.setattr("evaclip.data.mixture.mix", counted)
    drawn(100_000)
    assert calls["mix"] == 1


def test_mixture_batches_do_not_depend_on_ranks():
    def batches(size: int, world_size: int, count: int):
        loaders = [
            TrainLoader(
                mixture(), batch_size=size, transform=lambda image, seed: number_transform(image, seed),
                targets=lambda captions, seeds: number_tokens([f"0 {len(caption)}" for caption in captions], seeds),
                seed=3, rank=rank, world_size=world_size,
            ).batches(20)
            for rank in range(world_size)
        ]  # fmt: skip
        return [image.sum().item() for _ in range(count) for loader in loaders for image in next(loader).images]

    assert batches(8, 1, 6) == batches(8, 3, 6) == batches(4, 2, 12)


def test_mixture_counts_add_up():
    assert counts_of([1, 1, 1]) == [334, 333, 333]
    assert counts_of([0.8, 0.2]) == [800, 200]
    assert Counter(counts_of([1] * 7)) == {143: 6, 142: 1}


def test_mixture_samples_are_those_of_its_parts():
    source = mixture()
    assert len(source) == 140
    assert source[75].key == source.parts[1][5].key
    assert source.name(139) == source.parts[2].name(29)
    assert source.fingerprint != mixture(weights=(5, 4, 1)).fingerprint
    with pytest.raises(IndexError):
        source[140]


def test_mixture_is_configured():
    pieces = {name: PartConfig(train="synthetic", weight=weight) for name, weight in (("a", 4), ("b", 1))}
    source = open_configured(DataConfig(train="", mixture=pieces, num_samples=50))
    assert source.counts == [800, 200]
    assert source.description.startswith("80 % ")
    with pytest.raises(ValueError, match="train must be ''"):
        DataConfig(mixture=pieces)
    with pytest.raises(UserError, match="accepted is 1 in 1000"):
        mixture(weights=(1, 1, 1e-5))


def test_mixture_canonical_nodes():
    order = mixture().order(0, 16, nodes=2)
    whole = np.arange(4000)
    samples, nodes = order.indices(whole), order.nodes(whole)
    assert abs(nodes.mean() - 0.5) < 0.01
    for number, size in enumerate(SIZES):
        assert len(set(samples[parts(samples) == number])) == size
    now, after = order.shards(np.arange(20))
    assert now == after == [0, 1, 2]
    for index in range(50):
        assert parts(np.array([order.nearby(index, 7 * index)])) == parts(samples[index : index + 1])
