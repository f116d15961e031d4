"""What a store keeps, and what is left of it when its writer is killed."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_makers import DIM, filled, named, unit

from evaclip.errors import UserError
from evaclip.runtime import store as store_module
from evaclip.runtime.store import ROWS_FILE, Row, Store


def is_whole(folder):
    """Each row has its own embedding: that of `unit` whose number its name has."""
    with Store.open(folder) as store:
        numbers = np.flatnonzero(store.alive())
        ids = [int(Path(row.id).stem) for row in store.rows(numbers)]
        assert len(ids) == len(set(ids)) == len(store)
        expected = unit(max(ids, default=0) + 1)[ids]
        np.testing.assert_allclose(store.embeddings[numbers], expected, atol=1e-3)
        return len(store)


def test_store_round_trip(tmp_path):
    row = Row("a/ä.jpg", "ff", "a [red] bicycle", {"tags": ["x"], "size": 1.5}, b"\xff\xd8")
    with Store.create(tmp_path / "s", {"name": "tiny", "dim": DIM}) as store:
        store.add(unit(1), [row])
        assert store.rows([0]) == [row]
    with Store.open(tmp_path / "s") as store:
        assert store.rows([0]) == [row]
        assert store.contents() == {"a/ä.jpg": "ff"}
        np.testing.assert_array_equal(store.embeddings, unit(1))


def test_add_replaces_row_of_same_id(tmp_path):
    store = filled(tmp_path, unit(3))
    store.add(unit(1, seed=9), [Row("1.jpg", "new")])
    assert len(store) == 3
    assert store.contents()["1.jpg"] == "new"
    alive = store.embeddings[store.alive()].astype(np.float32)
    expected = np.concatenate([unit(3)[[0, 2]], unit(1, seed=9)])
    np.testing.assert_allclose(alive, expected, atol=1e-3)


def test_merged_copy_has_no_removed_rows(tmp_path):
    store = filled(tmp_path / "a", unit(100))
    reader = Store.open(store.folder)
    assert store.remove([f"{n}.jpg" for n in range(0, 100, 2)] + ["0.jpg", "none"]) == 50
    with pytest.raises(UserError, match="open it again"):
        reader.rows([0])
    copy = Store.create(tmp_path / "b", store.model)
    assert copy.merge(store) == len(copy) == copy.slots == 50
    copy.add(unit(101)[100:], named(1, 100))
    assert is_whole(copy.folder) == 51


def test_reader_refreshes_between_states(tmp_path):
    store, other = filled(tmp_path, unit(9)), Store.open(tmp_path)
    mapped = store.embeddings
    store.refresh()
    assert store.embeddings is mapped  # nothing has changed, so no page is mapped again

    def numbers():
        yield 5
        other.remove(["6.jpg"])
        yield 6

    with pytest.raises(UserError, match="open it again"):
        store.rows(numbers())
    store.refresh()
    assert len(store) == 8


def test_full_disk_adds_nothing(tmp_path):
    store = filled(tmp_path, unit(9))
    store._database.execute("PRAGMA max_page_count = 12")
    with pytest.raises(UserError, match="disk is full"):
        store.add(unit(2000), named(2000, 100))
    assert is_whole(tmp_path) == len(store) == 9


def test_add_wrong_input_adds_nothing(tmp_path, monkeypatch):
    store = filled(tmp_path, unit(2))
    with pytest.raises(UserError, match="embeddings"):
        store.add(unit(2), named(3))
    with pytest.raises(UserError, match=r"length 1, got 2 for '0.jpg'"):
        store.add(2 * unit(1), named(1))
    with pytest.raises(UserError, match=r"'0.jpg' is given twice"):
        store.add(unit(2), named(1) * 2)
    with pytest.raises(TypeError):
        store.add(unit(2, seed=5), [Row("x", "00"), Row("y", "00", metadata={"no": object()})])
    assert is_whole(tmp_path) == 2


def test_create_after_killed_create(tmp_path):
    for name in ("embeddings.f32", ".rows.sqlite.4752.tmp", ".rows.sqlite.4752.tmp-journal"):
        (tmp_path / name).write_bytes(b"")
    assert len(filled(tmp_path, unit(3))) == 3


def test_open_and_create_wrong_folder(tmp_path):
    with pytest.raises(UserError, match=r"isn't a store.*evaclip index"):
        Store.open(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="isn't an empty folder"):
        Store.create(tmp_path, {"dim": 4})
    with pytest.raises(UserError, match="'dim'"):
        Store.create(tmp_path / "new", {"name": "tiny"})
    (tmp_path / ROWS_FILE).write_text("no database at all, but long enough to be looked at" * 9)
    with pytest.raises(UserError, match="can't be read"):
        Store.open(tmp_path)


def test_two_creators_make_one_store(tmp_path, monkeypatch):
    """Where both did, what one adds would be in a database that the other has replaced."""
    made, refused, real = [], [], store_module.replacing

    def make():
        try:
            made.append(Store.create(tmp_path, {"dim": DIM}))
        except UserError as exc:
            refused.append(str(exc))

    second = threading.Thread(target=make)

    def slow(path):
        if second.ident is None:
            second.start()
            second.join(0.5)
        return real(path)

    monkeypatch.setattr(store_module, "replacing", slow)
    make()
    second.join()
    assert (len(made), len(refused)) == (1, 1)
    assert "isn't an empty folder" in refused[0]


@pytest.fixture
def two_stores(tmp_path, monkeypatch):
    """One with rows 0 to 5, another with 3 to 9, where 4 has another content and all have thumbnails; blocks of 3."""
    monkeypatch.setattr(store_module, "_BLOCK", 3)
    store, other = filled(tmp_path / "a", unit(6)), Store.create(tmp_path / "b", {"name": "tiny", "dim": DIM})
    rows = [replace(row, thumbnail=b"small") for row in named(7, 3)]
    rows[1] = replace(rows[1], content="new")
    other.add(unit(10)[3:], rows)
    return store, other


def test_merge_takes_new_and_changed_rows(two_stores):
    store, other = two_stores
    other.remove(["9.jpg"])
    assert store.merge(other) == 4
    assert is_whole(store.folder) == 9
    numbers = np.flatnonzero(store.alive())
    found = {row.id: row for row in store.rows(numbers)}
    expected = {row.id: row for row in [*named(6), *other.rows(np.flatnonzero(other.alive()))]}
    expected["3.jpg"], expected["5.jpg"] = named(1, 3)[0], named(1, 5)[0]  # they were there with the same content
    assert found == expected
    assert store.merge(other) == 0


def test_interrupted_merge_continues(two_stores, monkeypatch):
    store, other = two_stores
    add, blocks = Store.add, []

    def interrupted(self, embeddings, rows):
        if blocks:
            raise KeyboardInterrupt
        blocks.append(len(rows))
        add(self, embeddings, rows)

    monkeypatch.setattr(Store, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.merge(other)
    monkeypatch.undo()
    assert store.merge(other) == 5 - blocks[0]
    assert is_whole(store.folder) == 10


def test_merge_wrong_store(two_stores, tmp_path):
    store, _ = two_stores
    with pytest.raises(UserError, match="can't be merged into itself"):
        store.merge(Store.open(store.folder))
    with pytest.raises(UserError, match=r"another model \(name is 'tiny' there, 'huge' here\)"):
        store.merge(Store.create(tmp_path / "c", {"name": "huge", "dim": DIM}))
    assert is_whole(store.folder) == 6


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("year < 2002 and flag = true", [0]),
        ("year is not 2001", [0, 2, 3, 4, 5]),
        ("caption like '%TURE 4'", [4]),
        ("caption = 'x and y' or year in (2000, 2001)", [0, 1, 5]),
        ("contains(id, 'ÄPFEL')", [5]),
        ('"it\'s a key" = 7', [5]),
    ],
)
def test_select(tmp_path, where, expected):
    store = filled(tmp_path, unit(5))
    store.add(unit(1), [Row("äpfel", "00", "x and y", {"year": "unknown", "it's a key": 7})])
    assert store.select(where).tolist() == expected


def test_select_of_a_key_that_no_row_has(tmp_path):
    with pytest.raises(UserError, match=r"'yaer'.*'year'"):
        filled(tmp_path, unit(5)).select("year=2001 and yaer like 'x'")


@pytest.mark.parametrize(
    "where",
    [
        "year >",
        "1); DROP TABLE rows",
        "load_extension('x') = 1",
        "randomblob(1000000000) > 1",
        "1) UNION SELECT number FROM thumbnails --",
        "1 in (WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n)",
        "0) UNION ALL SELECT 7 UNION ALL SELECT -3 WHERE (1",
        "1) UNION ALL SELECT a.number FROM rows a, rows b, rows c WHERE (1",
        "year = (SELECT max(year) FROM rows)",
    ],
)
def test_select_refuses_what_is_no_condition(tmp_path, where):
    store = filled(tmp_path, unit(3))
    with pytest.raises(UserError, match="where must be"):
        store.select(where)
    assert is_whole(tmp_path) == len(store.select("year > 1")) == 3


def test_select_ends_a_condition_that_takes_long(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_LONGEST_CONDITION", 0.0)
    store = filled(tmp_path, unit(300))
    with pytest.raises(UserError, match="takes more than"):
        store.select("+".join(["length(id || caption)"] * 300) + " > 0")


_WRITER = """
import sys
from pathlib import Path
from evaclip.runtime.store import Store
from store_makers import named, unit
start, stop = int(sys.argv[2]), int(sys.argv[3])
vectors = unit(stop)
store = Store.open(Path(sys.argv[1]))
for n in range(start, stop, 10):
    store.add(vectors[n : n + 10], named(10, n))
    print(n + 10, flush=True)
"""


def writer(folder, start, stop):
    command = [sys.executable, "-c", _WRITER, str(folder), str(start), str(stop)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path.cwd())


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 20))])
def test_killed_writer_keeps_committed_rows(tmp_path, seed):
    Store.create(tmp_path, {"name": "tiny", "dim": DIM}).close()
    with writer(tmp_path, 0, 100_000) as process:
        for _ in range(5):
            line = process.stdout.readline()
        time.sleep(random.Random(seed).random() / 10)
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().split()
    told = int(lines[-1] if lines else line)
    count = is_whole(tmp_path)
    assert count % 10 == 0
    assert told <= count <= told + 10


def test_two_writers_at_a_time(tmp_path):
    Store.create(tmp_path, {"name": "tiny", "dim": DIM}).close()
    both = [writer(tmp_path, 0, 100), writer(tmp_path, 200, 300)]
    assert [process.communicate() and process.returncode for process in both] == [0, 0]
    assert is_whole(tmp_path) == 200
