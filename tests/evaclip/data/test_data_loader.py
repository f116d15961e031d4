"""Batches: order, resume, replaced samples, data workers."""

import errno
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from data_samples import make_loader, number_tokens, number_transform, numbers, picture, sample, take
from PIL import Image

from evaclip.data import TrainLoader, iterate, loader, open_source
from evaclip.data.samples import decode_image
from evaclip.data.shard_writer import write_shard
from evaclip.data.workers import WorkerDied, WorkerLoader
from evaclip.errors import UserError
from evaclip.packing import PackedImages, pack_images
from evaclip.transforms import PackedTransform


def damaged(number: int, **changes) -> tuple[str, dict[str, bytes]]:
    key, members = sample(number)
    return key, {name: content for name, content in {**members, **changes}.items() if content is not None}


@pytest.mark.parametrize(("limit", "decoded"), [(2**26, 64), (64 * 8, 192)])
def test_small_data_set_is_decoded_once(shards, monkeypatch, limit, decoded):
    calls = []

    def decode(*args):
        calls.append(args)
        return decode_image(*args)

    expected = take(make_loader(open_source(shards)), 24)
    monkeypatch.setattr(loader, "decode_image", decode)
    monkeypatch.setattr(loader, "_KEPT_BYTES", limit)
    batches = take(make_loader(open_source(shards)), 24)
    assert len(calls) == decoded
    assert all(torch.equal(one.images, other.images) for one, other in zip(expected, batches, strict=True))


def _sized(number: int, seed: int = 0) -> torch.Tensor:
    """`[3, 4 rows, 4 columns]`: 1 to 3 rows of patches by the number, 1 or 2 columns by the seed."""
    return torch.full((3, 4 * (1 + number % 3), 4 * (1 + seed % 2)), number, dtype=torch.uint8)


def _native(image: Image.Image, seed: int = 0) -> torch.Tensor:
    return _sized(image.convert("RGB").getpixel((0, 0))[1], seed)


_packed = PackedTransform(_native, 4)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.parametrize(("workers", "transform"), [(0, number_transform), (2, number_transform), (2, _packed)])
def test_batch_in_pieces_is_bit_exact(shards, monkeypatch, workers, transform):
    """To the bit, with bad samples in it, from a position in the middle, as one piece or several."""
    write_shard(
        Path(shards).parent / "01.tar", (damaged(i, **({"png": None} if i == 33 else {})) for i in range(20, 50))
    )
    source = open_source(shards, caption_key="json:captions")
    expected = take(make_loader(source, 16, transform=transform), 6, position=24)
    monkeypatch.setattr(loader, "UNIT", 5)
    options = {"workers": workers, "transform": transform}
    batches = take(make_loader(source, 16, **options), 6, position=24)
    pinned = take(make_loader(source, 16, pin=True, **options), 6, position=24)
    for whole, batch, several in zip(expected, batches, pinned, strict=True):
        assert_same_images(batch.images, whole.images)
        assert torch.equal(batch.targets, whole.targets)
        assert (batch.position, batch.skipped) == (whole.position, whole.skipped)
        assert [len(piece) for piece in several.pieces] == [4, 4, 4, 4]
        for rows in (slice(0, 16), slice(3, 9), slice(4, 8), slice(15, 16)):
            assert_same_images(several[rows].images, whole.images[rows])
    assert sum(batch.skipped for batch in batches) >= 1


def assert_same_images(found, expected):
    if isinstance(expected, PackedImages):
        names = "patches", "positions", "sizes", "lengths"
        found, expected = ([getattr(images, name) for name in names] for images in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_packed_batch_equals_single_images(shards):
    sizes = set()
    for batch in take(make_loader(open_source(shards), 16, transform=_packed), 5):
        shapes = batch.images.sizes.tolist()
        numbers = batch.targets[:, 0].tolist()
        images = [_sized(number, columns - 1) for number, (_, columns) in zip(numbers, shapes, strict=True)]
        assert_same_images(batch.images, pack_images(images, 4))
        sizes |= {*map(tuple, shapes)}
    assert len(sizes) == 6


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_stream_does_not_depend_on_workers_and_ranks(shards):
    """One process, four workers, two processes with a worker each: epoch ends, captions and augmentation."""
    source = open_source(shards, caption_key="json:captions")
    alone = take(make_loader(source, 8), 10)
    with_workers = take(make_loader(source, 8, workers=4), 10)
    ranks = [take(make_loader(source, 8, workers=1, rank=rank, world_size=2), 10) for rank in range(2)]
    for one, other, left, right in zip(alone, with_workers, *ranks, strict=True):
        for name in ("images", "targets"):
            expected = getattr(one, name)
            assert torch.equal(expected, getattr(other, name))
            assert torch.equal(expected, torch.cat([getattr(left, name), getattr(right, name)]))
        assert one.position == other.position == left.position == right.position


def test_position_with_other_batch_and_world_size(shards):
    source = open_source(shards)
    expected = numbers(take(make_loader(source, 8), 12))
    position = take(make_loader(source, 8), 3)[-1].position
    ranks = [take(make_loader(source, 18, rank=rank, world_size=4), 2, position) for rank in range(4)]
    assert [len(batches[0].images) for batches in ranks] == [4, 5, 4, 5]
    regrouped = [batch for group in zip(*ranks, strict=True) for batch in group]
    assert numbers(regrouped) == expected[24 : 24 + 36]


def test_augmentation_and_captions_vary_by_epoch(shards):
    batches = take(make_loader(open_source(shards, caption_key="json:captions")), 16)
    draws = [{}, {}]
    for epoch, batch in ((i // 8, batch) for i, batch in enumerate(batches)):
        for image, tokens in zip(batch.images, batch.targets, strict=True):
            draws[epoch][int(image[0])] = (int(image[1]), int(tokens[0]) // 1000)
    augmentations = [(draws[0][i][0], draws[1][i][0]) for i in range(64)]
    captions = [(draws[0][i][1], draws[1][i][1]) for i in range(64)]
    assert all(first != second for first, second in augmentations)
    assert 16 < sum(first != second for first, second in captions) < 48
    assert 40 < sum(sum(pair) for pair in captions) < 88


def test_bad_samples_are_replaced_and_logged(tmp_path, caplog):
    faults = {3: {"png": picture(3)[:30]}, 8: {"txt": None, "json": None}, 11: {"png": None}}
    faults[13] = {"png": picture(13, 7)}
    write_shard(tmp_path / "a.tar", (damaged(i, **faults.get(i, {})) for i in range(16)))
    assert 13 in numbers(take(make_loader(open_source(str(tmp_path / "a.tar"))), 2))
    source = open_source(str(tmp_path / "a.tar"), min_size=8)
    loader = make_loader(source)
    with caplog.at_level(logging.WARNING, "evaclip.data"):
        batches = take(loader, 4)
    assert [len(batch.images) for batch in batches] == [8] * 4
    assert not faults.keys() & set(numbers(batches))
    # One for each row, however many attempts its replacement took.
    assert 0 < sum(batch.skipped for batch in batches) < sum(loader.faults.counts.values())
    assert set(loader.faults.counts) == {"corrupt image", "missing caption", "missing image", "undersized image"}
    for name in ("corrupt image: ", "a.tar:000003", "missing caption: ", "a.tar:000008", "a.tar:000011"):
        assert name in caplog.text
    again = take(make_loader(source, workers=2), 4)
    assert numbers(again) == numbers(batches)
    assert [batch.skipped for batch in again] == [batch.skipped for batch in batches]


def test_samples_next_to_a_bad_one_stay(tmp_path, shards):
    sound = numbers(take(make_loader(open_source(shards)), 8))
    path = tmp_path / "01.tar"
    write_shard(path, (damaged(i, **({"txt": None, "json": None} if i == 33 else {})) for i in range(20, 50)))
    replaced = numbers(take(make_loader(open_source(shards)), 8))
    assert [new for old, new in zip(sound, replaced, strict=True) if old != 33] == [n for n in sound if n != 33]


@pytest.mark.parametrize("workers", [0, 1])
def test_source_of_bad_samples_is_an_error(tmp_path, workers):
    write_shard(tmp_path / "a.tar", (damaged(i, png=b"rubbish") for i in range(8)))
    loader = make_loader(open_source(str(tmp_path / "a.tar")), workers=workers)
    with pytest.raises(UserError, match=r"^\S*a\.tar: 100 samples in a row cannot be used, the last: corrupt image"):
        take(loader, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size .* got 0"),
        ({"workers": -1}, "workers must be 0 or more, got -1"),
        ({"window": -1}, "window must be 0 .* got -1"),
        ({"prefetch": 0}, "prefetch must be 1 or more, got 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"world_size": 9}, "batch_size must be 9 or more, .* got 8"),
    ],
)
def test_loader_wrong_number_is_refused(shards, options, message):
    with pytest.raises((UserError, ValueError), match=message):
        take(make_loader(open_source(shards), **options), 1)


def test_loader_keeps_the_default_generators(shards):
    before = torch.get_rng_state()
    take(make_loader(open_source(shards), workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_close_ends_the_workers(shards):
    stream = make_loader(open_source(shards), workers=2).batches()
    next(stream)
    # Python 3.14's default start method imports torch in each worker.
    assert [type(worker) for worker in multiprocessing.active_children()] == [multiprocessing.context.ForkProcess] * 2
    stream.close()
    assert not multiprocessing.active_children()


def test_worker_ignores_signals_of_its_group(shards):
    """Ctrl-C and a scheduler's SIGTERM go to the whole process group, while the trainer wants to save."""
    expected = numbers(take(make_loader(open_source(shards)), 12))
    stream = make_loader(open_source(shards), workers=1, prefetch=1).batches()
    taken = [next(stream)]
    (worker,) = multiprocessing.active_children()
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    taken += itertools.islice(stream, 11)
    assert numbers(taken) == expected
    for _ in range(50):
        if not worker.is_alive():
            break
        worker.terminate()  # a SIGTERM that is pending absorbs another
        worker.join(0.1)
    assert not worker.is_alive()
    stream.close()


def test_dead_worker_interrupts_no_step(shards):
    """Torch's handler of SIGCHLD would raise between any two lines, and leave other processes in a collective."""
    stream = make_loader(open_source(shards), workers=1, prefetch=1).batches()
    next(stream)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    worker.join(5)
    assert not worker.is_alive()
    with pytest.raises(WorkerDied, match=r"data worker 0 \(pid \d+\) was killed by SIGKILL: .*memory"):
        list(itertools.islice(stream, 3))  # what waits ready comes first


class BrokenBatch:
    """Unpickling it kills the worker that sent it."""

    def __reduce__(self):
        return break_off, (os.getpid(),)


def break_off(worker):
    threading.Timer(0.1, os.kill, (worker, signal.SIGKILL)).start()
    raise ConnectionResetError("no more of the batch")


def test_worker_that_dies_within_a_batch_is_named(monkeypatch):
    """The connection breaks before the process's end is signalled, on a busy machine long before."""
    monkeypatch.setattr("evaclip.data.workers._A_MOMENT", 60.0)
    with pytest.raises(WorkerDied, match=r"data worker 0 \(pid \d+\) was killed by SIGKILL"):
        next(iter(WorkerLoader([BrokenBatch()], range(1), workers=1)))


class SlowItems:
    def __getitem__(self, item):
        time.sleep(0.4)
        return item


def test_slow_worker_is_logged(caplog):
    assert list(WorkerLoader(SlowItems(), range(2), workers=1, patience=0.05)) == [0, 1]
    assert "data worker 0 (pid" in caplog.text


def test_failed_worker_start_names_workers_0(shards, monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)  # as without /dev/shm
    with pytest.raises(UserError, match=r"/dev/shm .*; 0 \(data.workers, --workers\)"):
        take(make_loader(open_source(shards), workers=2), 1)
    assert len(take(make_loader(open_source(shards), workers=0), 1)) == 1


def broken_transform(image, seed):
    raise AttributeError("no such thing")


def test_transform_error_is_no_bad_sample(shards):
    loader = TrainLoader(open_source(shards), batch_size=8, transform=broken_transform, targets=number_tokens, seed=0)
    with pytest.raises(AttributeError, match="no such thing") as caught:
        take(loader, 1)
    assert caught.value.__notes__[0].startswith(f"while transforming {Path(shards).parent}")


def no_class(captions, seeds):
    raise UserError("label 7 is no class")


@pytest.mark.parametrize("workers", [0, 1])
def test_target_error_names_its_samples(shards, workers):
    options = {"batch_size": 2, "transform": number_transform, "targets": no_class, "seed": 0, "workers": workers}
    with pytest.raises(UserError, match=r"^label 7 is no class; in 3 shards, .*, one of 0000\d+, 0000\d+$"):
        take(TrainLoader(open_source(shards), **options), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_iterate_keeps_the_order_of_the_source(shards, workers):
    batches = list(iterate(open_source(shards, caption_key="json:captions"), number_transform, 10, workers))
    assert [len(keys) for _, _, keys in batches] == [10] * 6 + [4]
    assert [key for _, _, keys in batches for key in keys] == [f"{i:06d}" for i in range(64)]
    assert [caption for _, captions, _ in batches for caption in captions] == [f"caption {i}" for i in range(64)]
    assert torch.cat([images[:, 0, 0, 0] for images, _, _ in batches]).tolist() == list(range(64))


def test_iterate_leaves_bad_samples_out(tmp_path, caplog):
    bad = {0, 1, 2, 3, 9}
    write_shard(tmp_path / "a.tar", (damaged(i, **({"png": b"rubbish"} if i in bad else {})) for i in range(12)))
    batches = list(iterate(open_source(str(tmp_path / "a.tar")), number_transform, 4))
    assert [batch.keys for batch in batches] == [[f"{i:06d}" for i in group] for group in ((4, 5, 6, 7), (8, 10, 11))]
    assert "a.tar:000009" in caplog.text
    with pytest.raises(UserError, match=r"batch_size .* got 0"):
        next(iterate(open_source(str(tmp_path / "a.tar")), number_transform, 0))


def test_canonical_nodes_give_each_rank_its_shards(tmp_path):
    for shard in range(16):
        write_shard(tmp_path / f"{shard:02d}.tar", map(sample, range(16 * shard, 16 * shard + 16)))
    source = open_source(str(tmp_path))
    options = {"nodes": 4, "window": 32}
    alone = take(make_loader(source, 16, **options), 32)
    assert all(sorted(numbers(alone[start : start + 16])) == list(range(256)) for start in (0, 16))
    ranks = [take(make_loader(source, 16, rank=rank, world_size=2, **options), 16) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=False):
        assert numbers([whole]) == numbers(parts)
    assert [len({number // 16 for number in numbers(batches)}) for batches in ranks] == [8, 8]
    # The position means the same for any batch size.
    assert sorted(numbers(take(make_loader(source, 32, **options), 4, 128))) == sorted(numbers(alone[8:16]))
    with pytest.raises(UserError, match=r"batch_size .* data\.canonical_nodes=3, .* got 16"):
        make_loader(source, 16, rank=0, world_size=2, nodes=3)
