"""Pictures to a store: each once, with its own embedding, whatever ends the work."""

import hashlib
import io
import itertools
import json
import os
import signal
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import as_file
from PIL import Image

from evaclip.data import open_source
from evaclip.data.image_folder import FolderSource
from evaclip.runtime import indexing
from evaclip.runtime.encoder import Encoder
from evaclip.runtime.indexing import UNREADABLE_FILE, describe, index
from evaclip.runtime.store import Store


@pytest.fixture
def encoder(loaded):
    return Encoder(loaded, device="cpu", precision="fp32", batch_size=4, threads=2)


@pytest.fixture
def folder(pictures, tmp_path):
    """Pictures at several depths, one that can't be read, and what is none."""
    root = tmp_path / "pictures"
    (root / "deep" / "deeper").mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.save(root / ("", "deep", "deep/deeper")[number % 3] / f"{number}.png")
    (root / "broken.jpg").write_bytes(b"no picture")
    (root / "notes.txt").write_text("no picture either")
    return root


def _store(path, encoder):
    return Store.open(path) if Store.exists(path) else Store.create(path, describe(encoder))


def _index(folder, path, encoder, **options):
    store = _store(path, encoder)
    return store, index(open_source(str(folder), captions=False), encoder, store, **options)


def _by_id(store):
    """Each row's embedding and content, by its id."""
    rows, embeddings = _rows(store), store.embeddings[store.alive()]
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: (embedding, row.content) for row, embedding in zip(rows, embeddings, strict=True)}


def _rows(store):
    return store.rows(store.alive().nonzero()[0])


def _is_right(store, files, encoder):
    found = _by_id(store)
    assert found.keys() == set(map(str, files))
    for file in files:
        embedding, content = found[str(file)]
        assert content == hashlib.sha256(file.read_bytes()).hexdigest()
        np.testing.assert_allclose(embedding, encoder.images([file])[0].numpy(), atol=1e-3)  # it is kept in 16 bits


def _good(folder):
    return sorted(folder.rglob("*.png"))


def test_index_of_folder_lists_unreadable_files(folder, tmp_path, encoder):
    store, progress = _index(folder, tmp_path / "store", encoder)
    _is_right(store, _good(folder), encoder)
    assert (progress.embedded, progress.unchanged, len(progress.faults)) == (7, 0, 1)
    listed = [json.loads(line) for line in (store.folder / UNREADABLE_FILE.format(0)).read_text().splitlines()]
    assert [(fault["name"], fault["what"]) for fault in listed] == [(str(folder / "broken.jpg"), "corrupt image")]


def test_index_adds_thumbnails_without_embedding(folder, tmp_path, encoder, pictures, monkeypatch):
    monkeypatch.setattr(indexing, "_ROWS", 2)
    _index(folder, tmp_path / "store", encoder)
    pictures[1].save(folder / "0.png")
    pictures[2].save(folder / "new.png")
    store, progress = _index(folder, tmp_path / "store", encoder, thumbnail=16)
    assert (progress.embedded, progress.unchanged, len(progress.faults)) == (2, 6, 1)
    rows = _rows(store)
    assert max(Image.open(io.BytesIO(row.thumbnail)).size[0] for row in rows) == 16
    of_rows = [row.thumbnail for row in rows if Path(row.id).name in ("0.png", "1.png")]
    assert of_rows[0] == of_rows[1]  # of the same picture, embedded and not
    _is_right(store, _good(folder), encoder)
    assert _index(folder, tmp_path / "store", encoder, thumbnail=16)[1].unchanged == 8


def test_index_reads_files_in_threads(folder, tmp_path, encoder, monkeypatch):
    """Two threads meet within a read; one thread alone would wait in vain."""
    read, barrier = FolderSource.__getitem__, threading.Barrier(2, timeout=30)
    (folder / "broken.jpg").unlink()
    (folder / "0.png").unlink()  # six are left

    def meeting(source, number):
        barrier.wait()
        return read(source, number)

    monkeypatch.setattr(FolderSource, "__getitem__", meeting)
    store, progress = _index(folder, tmp_path / "store", encoder)
    assert progress.embedded == len(store) == 6


def test_index_skips_files_of_known_size_and_time(folder, tmp_path, encoder, pictures, monkeypatch):
    _index(folder, tmp_path / "store", encoder)
    pictures[1].save(folder / "0.png")
    os.utime(folder / "0.png", ns=(0, 5))
    numbers, read = [], FolderSource.__getitem__
    monkeypatch.setattr(FolderSource, "__getitem__", lambda source, n: numbers.append(n) or read(source, n))
    store, progress = _index(folder, tmp_path / "store", encoder)
    assert (progress.embedded, progress.unchanged, len(progress.faults)) == (1, 6, 1)
    assert len(numbers) == 2  # the changed file, and the broken one
    _is_right(store, _good(folder), encoder)


def test_index_shards_with_missing_captions(pictures, tmp_path, encoder):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, picture in enumerate(pictures[:3]):
            members = {f"{number}.png": as_file(picture)} | ({f"{number}.txt": b"a cat"} if number == 1 else {})
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    store, _ = _index(tmp_path / "a.tar", tmp_path / "store", encoder)
    rows = _rows(store)
    assert [(row.id.rpartition(":")[2], row.caption) for row in rows] == [("0", ""), ("1", "a cat"), ("2", "")]


def _end_in_write(number: int, seconds: float) -> None:
    """Ends this process some time after its write of this number into a store begins; of number -1, after now."""
    add, numbers = Store.add, itertools.count()

    def add_or_end(*arguments: object) -> object:
        if next(numbers) == number:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        return add(*arguments)

    Store.add = add_or_end
    if number < 0:
        signal.setitimer(signal.ITIMER_REAL, seconds)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_index_killed_fifty_times_is_complete(tmp_path, encoder, monkeypatch):
    root, draw = tmp_path / "pictures", np.random.default_rng(0)
    root.mkdir()
    for number in range(200):
        Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(root / f"{number}.png")
    monkeypatch.setattr(indexing, "_ROWS", 8)
    torch.set_num_threads(1)  # a child that is forked has no other threads
    path, sizes = tmp_path / "store", [0]
    for _ in range(50):
        number, seconds, child = draw.integers(-1, 4), draw.uniform(1e-5, 0.01), os.fork()
        if child == 0:
            _end_in_write(number, seconds)
            torch.set_num_threads(1)  # renews torch's thread pool; two reader threads at once would fail to
            _index(root, path, encoder)
            os._exit(0)
        os.waitpid(child, 0)
        sizes.append(len(_by_id(Store.open(path))) if Store.exists(path) else 0)
    assert sizes == sorted(sizes)
    assert any(0 < size < 200 for size in sizes)
    store, _ = _index(root, path, encoder)
    _is_right(store, sorted(Path(root).iterdir()), encoder)


def test_index_table_with_repeated_image(folder, encoder, tmp_path):
    table = tmp_path / "pairs.csv"
    names = ["0.png", "3.png", "0.png", "6.png", "0.png"]
    table.write_text("filepath,title\n" + "".join(f"{folder / name},caption {n}\n" for n, name in enumerate(names)))
    store, progress = _index(table, tmp_path / "store", encoder)
    assert [row.caption for row in _rows(store)] == ["caption 0", "caption 1", "caption 3"]
    assert [dict(row.metadata) for row in _rows(store)] == [{"captions": [f"caption {n}" for n in (0, 2, 4)]}, {}, {}]
    assert store.select("contains(captions, 'caption 4')").tolist() == [0]
    assert (progress.embedded, progress.unchanged) == (3, 2)
    parts = [(_rows(store), store.embeddings[:3].astype(np.float32))] * 2  # as from two workers
    twice = Store.create(tmp_path / "twice", describe(encoder))
    indexing.keep(iter(parts), twice)
    assert len(twice) == 3
