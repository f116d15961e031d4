import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaclip.data.order import mix, sample_order

shard_lists = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(shard_lists, st.integers(0, 300), st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_order_of_an_epoch_is_a_permutation(sizes, window, seed, epoch):
    total = sum(sizes)
    order = sample_order(total, seed, window, sizes)
    indices = order.indices(np.arange(epoch * total, (epoch + 1) * total))
    assert sorted(indices.tolist()) == list(range(total))


@settings(max_examples=40, deadline=None)
@given(shard_lists, st.integers(0, 300), st.integers(0, 10_000))
def test_order_of_one_index_equals_that_of_many(sizes, window, start):
    order = sample_order(sum(sizes), 3, window, sizes)
    many = order.indices(np.arange(start, start + 20)).tolist()
    assert [order.indices(np.array([start + i])).item() for i in range(20)] == many


def test_order_is_that_of_published_runs():
    """A checkpoint holds a position only, so the order itself is a file format."""
    order = sample_order(10, seed=1, window=4, shard_sizes=[3, 5, 2])
    assert order.indices(np.arange(20)).tolist() == [3, 5, 4, 6, 7, 0, 1, 2, 9, 8, 2, 0, 8, 1, 3, 5, 9, 4, 7, 6]


def test_order_varies_by_seed_and_epoch():
    first, second = (sample_order(100, seed, 0).indices(np.arange(200)).reshape(2, 100) for seed in (0, 1))
    assert (first[0] != first[1]).mean() > 0.9
    assert (first[0] != second[0]).mean() > 0.9


def test_order_window_reads_few_shards():
    sizes = [100] * 50
    order = sample_order(5000, 0, window=200, shard_sizes=sizes)
    for first in range(0, 5000, 200):
        assert len(set((order.indices(np.arange(first, first + 200)) // 100).tolist())) <= 3


def test_order_is_uniform():
    draws = 1500
    order = sample_order(6, seed=5)
    table = order.indices(np.arange(6 * draws)).reshape(draws, 6)
    for place in range(6):
        counts = np.bincount(table[:, place], minlength=6)
        assert abs(counts - draws / 6).max() < 5 * (draws / 6) ** 0.5


def test_order_memory_is_constant():
    order = sample_order(2_000_000_000_000, seed=0, window=0)
    indices = order.indices(np.arange(10**15, 10**15 + 1000))
    assert len(set(indices.tolist())) == 1000
    assert indices.min() >= 0
    assert indices.max() < 2_000_000_000_000


@pytest.mark.parametrize(("samples", "window", "sizes"), [(0, 0, None), (5, -1, None), (5, 0, [2, 2])])
def test_order_of_wrong_numbers_is_refused(samples, window, sizes):
    with pytest.raises(ValueError, match=r"0|-1|4"):
        sample_order(samples, 0, window, sizes)


def test_mix_depends_on_every_value():
    hashes = {int(mix(*values)[0]) for values in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0), (2**64 - 1, 5)]}
    assert len(hashes) == 6


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


def test_order_of_one_canonical_node():
    with_one, without = (sample_order(100, 1, 30, [40, 60], *nodes) for nodes in ((1,), ()))
    assert np.array_equal(with_one.indices(np.arange(300)), without.indices(np.arange(300)))
    for wrong in (0, 101):
        with pytest.raises(ValueError, match=f"canonical nodes and at most one a sample, got {wrong}"):
            sample_order(100, 1, 30, [40, 60], wrong)


@settings(max_examples=60, deadline=None)
@given(shard_lists, st.integers(1, 60), st.integers(1, 3), st.integers(0, 500))
def test_order_predicts_the_next_shards(sizes, window, nodes, start):
    nodes = min(nodes, sum(sizes))
    total = sum(sizes)
    order = sample_order(total, 5, window, sizes, nodes)
    ends = np.cumsum(sizes)

    def read(indices: np.ndarray) -> set[int]:
        return set(np.searchsorted(ends, order.indices(indices), side="right").tolist())

    batch = np.arange(start, start + 4)
    now, after = order.shards(batch)
    assert read(batch) <= set(now)
    # A window's length ahead, in the same epoch, lies this window or the next.
    ahead = np.arange(start, min(start + nodes * window, (start // total + 1) * total))
    assert read(ahead[np.isin(order.nodes(ahead), order.nodes(batch))]) <= {*now, *after}
    # After the last window of an epoch comes the first of the next.
    last = (start // total + 1) * total - 1
    first = np.arange(last + 1, last + 1 + total)
    first = first[order.nodes(first) == order.nodes(np.array([last]))]
    assert order.shards(np.array([last]))[1] == order.shards(first[:1])[0]
    assert read(first[:window]) == set(order.shards(first[:1])[0])


@settings(max_examples=40, deadline=None)
@given(shard_lists, st.integers(1, 60), st.integers(1, 3), st.integers(0, 500), st.integers(0, 2**64 - 1))
def test_nearby_samples_are_of_the_same_window(sizes, window, nodes, index, draw):
    nodes = min(nodes, sum(sizes))
    order = sample_order(sum(sizes), 5, window, sizes, nodes)
    found = order.nearby(index, draw)
    shard = int(np.searchsorted(np.cumsum(sizes), found, side="right"))
    assert shard in order.shards(np.array([index]))[0]
    assert order.nearby(index, draw) == found
