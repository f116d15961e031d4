"""The validation split of the training data."""

import itertools
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_samples import number_tokens, number_transform, picture

from evaclip.data import Source, TrainLoader, open_source
from evaclip.data.mixture import MixtureSource
from evaclip.data.synthetic import SyntheticSource
from evaclip.data.validation import Rest, hold_out


def numbers(source: Source) -> list[int]:
    """The samples' own numbers, which their captions tell."""
    return [int(source[index].caption.split()[-1]) for index in range(len(source))]


def trained_on(source: Source, seed: int, batches: int, workers: int = 0) -> Iterator[int]:
    options = {"batch_size": 4, "transform": number_transform, "targets": number_tokens, "window": 8}
    loader = TrainLoader(source, seed=seed, workers=workers, **options)
    for batch in itertools.islice(loader.batches(), batches):
        yield from batch.images[:, 0, 0, 0].int().tolist()


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


def test_hold_out_memory_is_bounded() -> None:
    source = SyntheticSource(1_000_000)
    tracemalloc.start()
    hold_out(source, 0.01, seed=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(source)


def test_training_never_reads_the_split(shards: str) -> None:
    rest, held = hold_out(open_source(shards), 0.25, seed=3)
    seen = list(trained_on(rest, seed=3, batches=36))
    assert set(seen) == set(range(64)) - set(numbers(held))
    assert sorted(seen[:48]) == sorted(set(seen))


def test_split_depends_on_the_seed_only(shards: str) -> None:
    first, again = (hold_out(open_source(shards), 0.25, seed=3) for _ in range(2))
    assert first[0].fingerprint == again[0].fingerprint
    assert numbers(first[1]) == numbers(again[1])
    other = hold_out(open_source(shards), 0.25, seed=4)
    assert numbers(other[1]) != numbers(first[1])
    assert other[0].fingerprint != first[0].fingerprint


def test_split_limits(shards: str) -> None:
    whole = open_source(shards)
    assert len(hold_out(whole, 0.5, seed=0, most=10)[1]) == 10
    for share in (0.0, 0.01):
        assert hold_out(whole, share, seed=0) == (whole, None)


def test_split_may_take_a_whole_shard(shards: str) -> None:
    rest = Rest(open_source(shards), np.arange(20, 50))
    assert list(rest.shard_sizes) == [20, 0, 14]
    assert numbers(rest) == [*range(20), *range(50, 64)]
    assert set(trained_on(rest, seed=1, batches=9)) == set(numbers(rest))


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
    assert [len(part) for part in rest.parts] == [48, 15]
    assert len(held) == 16 + 5
    assert [held.name(i) for i in range(len(held))] == [mixed.name(int(held[i].key)) for i in range(len(held))]
