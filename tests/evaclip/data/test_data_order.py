"""The order of samples, mixtures of data sets, and the validation split."""

from pathlib import Path

import numpy as np
import pytest
from data_samples import make_loader, number_tokens, number_transform, picture, take
from data_samples import numbers as image_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from evaclip.data import DataConfig, Source, TrainLoader, open_configured, open_source
from evaclip.data.config import MixtureItem
from evaclip.data.mixture import MixtureSource
from evaclip.data.order import rows_by_node, sample_order
from evaclip.data.synthetic import SyntheticSource
from evaclip.data.validation import hold_out
from evaclip.errors import UserError

shard_lists = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(shard_lists, st.integers(0, 300), st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_order_of_an_epoch_is_a_permutation(sizes, window, seed, epoch):
    total = sum(sizes)
    order = sample_order(total, seed, window, sizes)
    indices = order.indices(np.arange(epoch * total, (epoch + 1) * total))
    assert sorted(indices.tolist()) == list(range(total))


def test_order_is_that_of_published_runs():
    """A checkpoint holds a position only, so the order itself is a file format."""
    order = sample_order(10, seed=1, window=4, shard_sizes=[3, 5, 2])
    assert order.indices(np.arange(20)).tolist() == [3, 5, 4, 6, 7, 0, 1, 2, 9, 8, 2, 0, 8, 1, 3, 5, 9, 4, 7, 6]


def test_order_window_reads_few_shards():
    sizes = [100] * 50
    order = sample_order(5000, 0, window=200, shard_sizes=sizes)
    for first in range(0, 5000, 200):
        assert len(set((order.indices(np.arange(first, first + 200)) // 100).tolist())) <= 3


@settings(max_examples=60, deadline=None)
@given(shard_lists, st.integers(0, 60), st.integers(1, 5), st.integers(0, 20))
def test_canonical_nodes_divide_every_epoch(sizes, window, nodes, epoch):
    total = sum(sizes)
    nodes = min(nodes, total)
    order = sample_order(total, 5, window, sizes, nodes)
    positions = np.arange(epoch * total, (epoch + 1) * total)
    indices, of_node = order.indices(positions), order.nodes(positions)
    assert sorted(indices.tolist()) == list(range(total))
    # Each node reads one stretch of the shuffled shards, and so shares at most its first and last shard.
    shards = np.searchsorted(np.cumsum(sizes), indices, side="right")
    read = [set(shards[of_node == node].tolist()) for node in range(nodes)]
    assert sum(map(len, read)) <= len(sizes) + nodes - 1


@settings(max_examples=40, deadline=None)
@given(shard_lists, st.integers(1, 60), st.integers(1, 3), st.integers(0, 500), st.integers(0, 2**64 - 1))
def test_nearby_samples_are_of_the_same_window(sizes, window, nodes, index, draw):
    nodes = min(nodes, sum(sizes))
    order = sample_order(sum(sizes), 5, window, sizes, nodes)
    found = order.nearby(index, draw)
    shard = int(np.searchsorted(np.cumsum(sizes), found, side="right"))
    assert shard in order.shards(np.array([index]))[0]
    assert order.nearby(index, draw) == found


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


def test_mixture_order_is_that_of_published_runs():
    indices = np.array([5000, 3, 999, 1000, 10**12 + 7, 3, 2500])
    assert mixture().order(0, 0).indices(indices).tolist() == [27, 58, 115, 20, 62, 58, 92]


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


@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans(), st.integers(1, 7), st.integers(0, 20_000), st.integers(1, 5000))
def test_rows_by_node_equal_a_sorted_batch(data, mixed, nodes, start, size):
    order = mixture().order(3, 20, nodes) if mixed else sample_order(140, 3, 20, SIZES, nodes)
    first, last = sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2)))
    batch = np.arange(start, start + size)
    expected = batch[np.argsort(order.nodes(batch), kind="stable")][first:last]
    found = rows_by_node(order, range(start, start + size), range(first, last))
    assert found.dtype == np.int64
    assert found.tolist() == expected.tolist()


def test_rows_by_node_look_at_few_samples(monkeypatch):
    order = mixture(sizes=(10**6, 10**6, 10**6)).order(0, 1000, nodes=64)
    asked, original = [], order.nodes
    monkeypatch.setattr(order, "nodes", lambda indices: asked.append(len(indices)) or original(indices))
    assert len(rows_by_node(order, range(10**7, 10**7 + 131_072), range(70_000, 70_064))) == 64
    assert sum(asked) <= 6000


def test_mixture_is_configured():
    pieces = {name: MixtureItem(train="synthetic", weight=weight) for name, weight in (("a", 4), ("b", 1))}
    source = open_configured(DataConfig(train="", mixture=pieces, num_samples=50))
    assert source.counts == [800, 200]
    assert source.description.startswith("80 % ")
    with pytest.raises(ValueError, match="train must be ''"):
        DataConfig(mixture=pieces)
    with pytest.raises(UserError, match="accepted is 1 in 1000"):
        mixture(weights=(1, 1, 1e-5))


def numbers(source: Source) -> list[int]:
    """The samples' own numbers, which their captions tell."""
    return [int(source[index].caption.split()[-1]) for index in range(len(source))]


def test_split_halves_make_the_whole(shards: str) -> None:
    whole = open_source(shards)
    rest, held = hold_out(whole, 0.25, seed=3)
    assert len(held) == 16
    assert sorted(numbers(rest) + numbers(held)) == list(range(64))
    assert numbers(rest) == sorted(numbers(rest))
    for shard, own in enumerate((range(20), range(20, 50), range(50, 64))):
        assert rest.shard_sizes[shard] == len(set(own) - set(numbers(held)))
    assert [rest.name(i) for i in range(len(rest))] == [whole.name(number) for number in numbers(rest)]
    with pytest.raises(IndexError):
        rest[len(rest)]


def test_held_out_samples_are_those_of_published_runs() -> None:
    golden = [275030, 403820, 409053, 420906, 435772, 643900, 739156, 901258, 904331, 948472]
    _, held = hold_out(SyntheticSource(1_000_000), 1e-5, seed=3)
    assert [int(held[index].key) for index in range(len(held))] == golden


def test_training_never_reads_the_split(shards: str) -> None:
    rest, held = hold_out(open_source(shards), 0.25, seed=3)
    seen = image_numbers(take(make_loader(rest, 4), 36))
    assert set(seen) == set(range(64)) - set(numbers(held))
    assert sorted(seen[:48]) == sorted(set(seen))


def test_captions_of_one_image_stay_together(tmp_path: Path) -> None:
    rows = ["filepath,title"]
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
        rows += [f"{number}.png,caption {number}", f"{number}.png,again {number}"]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    rest, held = hold_out(open_source(str(tmp_path / "table.csv")), 0.2, seed=0)
    assert len(held) == 12
    assert not set(numbers(rest)) & set(numbers(held))


def test_split_takes_a_share_of_each_mixture_part(shards: str) -> None:
    parts = [open_source(shards), open_source(shards.replace("{00..02}", "00"))]
    mixed = MixtureSource(parts, [3, 1])
    rest, held = hold_out(mixed, 0.25, seed=0)
    assert [len(part) for part in rest.sources] == [48, 15]
    assert len(held) == 16 + 5
    assert [held.name(i) for i in range(len(held))] == [mixed.name(int(held[i].key)) for i in range(len(held))]
