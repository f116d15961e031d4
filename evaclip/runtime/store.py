"""The store: embeddings and the rows that they belong to, in a folder that stays whole when a writer is killed.

STORE/rows.sqlite holds the rows, the model and the number of slots. STORE/embeddings.f32 holds float32 `[slots, dim]`,
where slot i belongs to row number i; numbers are never reused. A writer appends embeddings, waits for the disk, and
commits the new number of slots. It holds SQLite's write transaction meanwhile, so writers take turns, and the kernel
ends the transaction with the process.
"""

import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from evaclip.atomic import locked, reading, replacing, writing
from evaclip.errors import UserError, unknown_name

ROWS_FILE = "rows.sqlite"
EMBEDDINGS_FILE = "embeddings.f32"
WHERE = "a condition in SQL on id, content, caption and keys of the metadata"

_FORMAT = 4
_PATIENCE = 600.0
"""Seconds that a writer waits for another writer's transaction."""
_BLOCK = 4096
"""Rows that `merge` takes at once."""
_TABLES = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE rows (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, content TEXT NOT NULL, caption TEXT NOT NULL,
                   metadata TEXT NOT NULL, stamp TEXT NOT NULL);
CREATE TABLE thumbnails (number INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE free (number INTEGER PRIMARY KEY);
CREATE TABLE keys (name TEXT PRIMARY KEY);
"""
_ROW = (
    "SELECT id, content, caption, metadata, data, stamp FROM rows LEFT JOIN thumbnails USING (number) WHERE number = ?"
)
_COLUMNS = ("id", "content", "caption")
_FUNCTIONS = {
    *("abs", "coalesce", "contains", "glob", "ifnull", "instr", "json_array_length", "json_extract", "length", "like"),
    *("lower", "max", "min", "nullif", "round", "substr", "trim", "typeof", "upper", "->", "->>"),
}
"""Functions that a condition may call. Conditions come from users who may only search."""
_SELECTS = 2
"""SELECTs in the query of `select`. One more would be of the condition, which is an expression on one row."""
_LONGEST_CONDITION = 10.0
"""Seconds that a condition may take."""


@dataclass(frozen=True)
class Row:
    """The image of an embedding.

    Attributes:
        id: where it is: a path, or the shard and the key in it.
        content: hash of the file's bytes, in hexadecimal.
        metadata: anything that JSON has.
        thumbnail: an encoded image.
        stamp: size and time of the file when it was read; "" if unknown.
    """

    id: str
    content: str
    caption: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    thumbnail: bytes | None = None
    stamp: str = ""


class Store:
    """A folder of embeddings. Made by `create` or `open`; a context manager that closes it.

    What it shows is the store at the time when it was opened, or last written or refreshed by this object.

    Attributes:
        folder: where it is.
        model: what the embeddings are of, as given to `create`.
        dim: length of an embedding.
        slots: numbers given out, to rows and to removed rows.
    """

    def __init__(self, folder: Path, database: sqlite3.Connection) -> None:
        self.folder = folder
        self._database = database
        database.create_function("contains", 2, _contains, deterministic=True)
        database.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 200)
        self._version: int | None = None
        self.refresh()

    @classmethod
    def create(cls, folder: str | Path, model: Mapping[str, Any]) -> Self:
        """Makes an empty store.

        Args:
            folder: to make; one that exists must be empty.
            model: what its embeddings are made with: `dim`, and name, weights, their hash, precision or whatever else
                distinguishes them from other models' embeddings. JSON values.

        Raises:
            UserError: the folder holds something, can't be written, or `model` has no `dim`.

        Example:
            `Store.create("photos.store", {"name": "EVA02-CLIP-B-16", "sha256": "...", "dim": 512})`
        """
        folder, dim = Path(folder), model.get("dim")
        if not isinstance(dim, int) or dim < 1:
            raise UserError(f"a store's model needs 'dim', the length of its embeddings, got {dim!r}")
        refused = UserError(f"cannot make a store of {folder}: it isn't an empty folder; give another one")
        if folder.exists() and not folder.is_dir():
            raise refused
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with writing(folder), locked(folder):
            if not all(map(_is_left, folder.iterdir())):
                raise refused
            (folder / EMBEDDINGS_FILE).touch()
            # With this file the folder is a store.
            with replacing(folder / ROWS_FILE) as temporary, closing(sqlite3.connect(temporary)) as database:
                about = {"format": _FORMAT, "model": dict(model), "slots": 0}
                database.executescript(_TABLES)
                values = ((key, json.dumps(value)) for key, value in about.items())
                database.executemany("INSERT INTO about VALUES (?, ?)", values)
                database.commit()
        return cls.open(folder)

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether the folder is a store."""
        return (Path(folder) / ROWS_FILE).is_file()

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Opens a store, to read and to write.

        Raises:
            UserError: the folder isn't a store, or is one of a later version.
        """
        folder = Path(folder)
        path = folder / ROWS_FILE
        if not cls.exists(folder):
            raise UserError(f"{folder} isn't a store: there is no {ROWS_FILE} in it; `evaclip index` makes one")
        uri = f"{path.absolute().as_uri()}?mode=rw"
        database = sqlite3.connect(uri, _PATIENCE, isolation_level=None, check_same_thread=False, uri=True)
        try:
            return cls(folder, database)
        except sqlite3.DatabaseError as exc:
            raise UserError(f"{path} can't be read: {exc}") from exc

    def refresh(self) -> None:
        """Takes in what other processes have written; where that is nothing, it costs nothing."""
        (version,) = self._database.execute("PRAGMA data_version").fetchone()
        if version != self._version:
            self._read()
            self._version = version

    def _read(self) -> None:
        # One statement, as a writer may come between two.
        found = self._database.execute("SELECT key, value FROM about UNION ALL SELECT '', number FROM free").fetchall()
        about = {key: json.loads(value) for key, value in found if key}
        if about.get("format") != _FORMAT:
            raise UserError(
                f"{self.folder} has the format {about.get('format')!r}; this version reads {_FORMAT}: index the images"
                " into a new store"
            )
        self.model: dict[str, Any] = about["model"]
        self.dim: int = self.model["dim"]
        self.slots: int = about["slots"]
        self._free = np.array([number for key, number in found if not key], dtype=np.int64)
        self._embeddings: NDArray[np.float32] | None = None

    def require_model(self, model: Mapping[str, Any]) -> None:
        """Raises UserError if embeddings of this model can't be compared with the store's.

        Where its weights lie, `given`, may differ.
        """
        keys = sorted(key for key in {*self.model, *model} - {"given"} if self.model.get(key) != model.get(key))
        if keys:
            unlike = "; ".join(
                f"{key} is {_short(self.model.get(key))} there, {_short(model.get(key))} here" for key in keys
            )
            raise UserError(f"the embeddings in {self.folder} are of another model ({unlike}): make a new store")

    def add(self, embeddings: NDArray[np.floating[Any]], rows: Sequence[Row]) -> None:
        """Add rows atomically, replacing rows with the same ids; they are on disk on return.

        Args:
            embeddings: float `[n, dim]`, each of length 1; stored in float32.
            rows: what they are of; no two have the same id.

        Raises:
            UserError: for wrong shapes, lengths or ids, or a folder that can't be written.
        """
        vectors = self._checked(embeddings, rows)
        with self._writing() as database:
            first = self.slots
            _write(self.embeddings_file, first, vectors)
            self._forget(database, [row.id for row in rows])
            records = (
                (
                    number,
                    row.id,
                    row.content,
                    row.caption,
                    json.dumps(dict(row.metadata), ensure_ascii=False),
                    row.stamp,
                )
                for number, row in enumerate(rows, start=first)
            )
            database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", records)
            keys = {key for row in rows for key in row.metadata}
            database.executemany("INSERT OR IGNORE INTO keys VALUES (?)", [(key,) for key in keys])
            thumbnails = ((number, row.thumbnail) for number, row in enumerate(rows, start=first) if row.thumbnail)
            database.executemany("INSERT INTO thumbnails VALUES (?, ?)", thumbnails)
            database.execute("UPDATE about SET value = ? WHERE key = 'slots'", (json.dumps(first + len(rows)),))

    def without_thumbnail(self) -> dict[str, str]:
        """The ids of rows that have no thumbnail, and the hashes of their content."""
        query = "SELECT id, content FROM rows LEFT JOIN thumbnails USING (number) WHERE data IS NULL"
        return dict(self._database.execute(query).fetchall())

    def add_thumbnails(self, rows: Iterable[Row]) -> None:
        """Gives those of `rows` that the store has without one, with the same content, their thumbnail."""
        query = "INSERT OR IGNORE INTO thumbnails SELECT number, ? FROM rows WHERE id = ? AND content = ?"
        with self._writing() as database:
            database.executemany(query, ((row.thumbnail, row.id, row.content) for row in rows if row.thumbnail))

    def merge(self, other: "Store") -> int:
        """Copy the rows of another store, except rows that this one has with the same id and content.

        A block of rows is written after the other, each as a whole; what was ended goes on when it is asked for again.

        Returns:
            How many rows were taken.

        Raises:
            UserError: the other store is of another model or is this one, or rows of it are replaced meanwhile.
        """
        self.require_model(other.model)
        if self.folder.samefile(other.folder):
            raise UserError(f"{other.folder} can't be merged into itself")
        taken, known = 0, self.contents()
        for start in range(0, other.slots, _BLOCK):
            block = (start, min(start + _BLOCK, other.slots))
            found = other._database.execute(
                "SELECT number, id, content FROM rows WHERE number >= ? AND number < ?", block
            )
            numbers = [number for number, id, content in found if known.get(id) != content]
            if numbers:
                rows = other.rows(numbers)
                self.add(other.embeddings[numbers], rows)
            taken += len(numbers)
        return taken

    def remove(self, ids: Iterable[str]) -> int:
        """Removes the rows of these ids; returns how many there were."""
        with self._writing() as database:
            count = self._forget(database, list(dict.fromkeys(ids)))
        return count

    def contents(self) -> dict[str, str]:
        """The hash of what each id held when it was embedded."""
        return {id: content for id, (content, _) in self.states().items()}

    def states(self) -> dict[str, tuple[str, str]]:
        """Content and stamp of each id when it was embedded."""
        found = self._database.execute("SELECT id, content, stamp FROM rows").fetchall()
        return {id: (content, stamp) for id, content, stamp in found}

    def __len__(self) -> int:
        return self.slots - len(self._free)

    @property
    def embeddings_file(self) -> Path:
        """The file of the embeddings."""
        return self.folder / EMBEDDINGS_FILE

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """All embeddings, float32 `[slots, dim]`, mapped into memory; `alive` says which of them have a row."""
        if self._embeddings is None:  # kept, as each page that is touched for the first time costs a fault
            with reading(self.embeddings_file):
                self._embeddings = (
                    np.memmap(self.embeddings_file, "<f4", "r", shape=(self.slots, self.dim))
                    if self.slots
                    else np.empty((0, self.dim), np.float32)
                )
        return self._embeddings

    def alive(self) -> NDArray[np.bool_]:
        """Which numbers have a row, bool `[slots]`."""
        mask = np.ones(self.slots, dtype=np.bool_)
        mask[self._free] = False
        return mask

    def select(self, where: str) -> NDArray[np.int64]:
        """Numbers of the rows that meet a condition, in rising order.

        Args:
            where: an expression of SQLite on `id`, `content`, `caption` and the keys of the metadata. Beside
                operators, `like` and `glob` there is `contains(text, part)`, which heeds no case. Keys that aren't
                plain words stand in double quotes.

        Raises:
            UserError: SQLite can't read it, no row has one of its keys, it takes 10 seconds, or it asks for anything
                but these rows.

        Example:
            `store.select("year >= 2020 and contains(caption, 'bicycle')")`
        """
        if not len(self):
            return np.empty(0, np.int64)
        keys = {name for (name,) in self._database.execute("SELECT name FROM keys")} - {*_COLUMNS}
        named = [key for key in keys if key in where and '"' not in key]
        paths = {key: key.replace("'", "''") for key in named}
        columns = "".join(f', metadata ->> \'$."{path}"\' AS "{key}"' for key, path in paths.items())
        # An unknown name in double quotes would be a text to SQLite.
        for quoted in re.findall(r'"([^"]*)"', re.sub(r"'[^']*'", "", where)):
            if quoted not in {*named, *_COLUMNS}:
                raise unknown_name("where key", quoted, {*_COLUMNS, *keys})
        # The line break ends a comment.
        query = f"SELECT number FROM (SELECT number, id, content, caption{columns} FROM rows) WHERE ({where}\n)"
        end = time.monotonic() + _LONGEST_CONDITION
        self._database.set_progress_handler(lambda: time.monotonic() > end, 10_000)
        self._database.set_authorizer(_authorizer())
        try:
            found = self._database.execute(query).fetchall()
        except (sqlite3.Error, sqlite3.Warning) as exc:
            unknown = re.fullmatch(r"no such column: (\S+)", str(exc))
            if unknown:
                raise unknown_name("where key", unknown[1], {*_COLUMNS, *keys}) from None
            why = f"it takes more than {_LONGEST_CONDITION:g} s" if str(exc) == "interrupted" else str(exc)
            raise UserError(
                f"where must be {WHERE}, such as \"year >= 2020 and caption like '%dog%'\", got {where!r}: {why}"
            ) from exc
        finally:
            self._database.set_authorizer(None)
            self._database.set_progress_handler(None, 0)
        numbers = np.sort(np.array(found, dtype=np.int64).reshape(-1))
        return numbers[numbers < self.slots]

    def rows(self, numbers: Iterable[int]) -> list[Row]:
        """The rows of these numbers, in their order.

        Raises:
            UserError: another process has removed or replaced one of them.
        """
        found = [self._database.execute(_ROW, (int(number),)).fetchone() for number in numbers]
        if None in found:
            raise UserError(f"{self.folder} was changed by another process: open it again")
        return [
            Row(id, content, caption, json.loads(metadata), data, stamp)
            for id, content, caption, metadata, data, stamp in found
        ]

    def close(self) -> None:
        """Closes the files."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _checked(self, embeddings: NDArray[Any], rows: Sequence[Row]) -> NDArray[np.float32]:
        expected = (len(rows), self.dim)
        if embeddings.shape != expected:
            raise UserError(f"embeddings must be {list(expected)} for {len(rows)} rows, got {list(embeddings.shape)}")
        vectors = np.ascontiguousarray(embeddings, "<f4")
        lengths = np.linalg.norm(vectors, axis=1)
        wrong = np.flatnonzero(~(np.abs(lengths - 1) < 0.01))
        if len(wrong):
            raise UserError(f"embeddings must have length 1, got {lengths[wrong[0]]:g} for {rows[wrong[0]].id!r}")
        ids = [row.id for row in rows]
        if len(set(ids)) < len(ids):
            twice = next(id for number, id in enumerate(ids) if id in ids[:number])
            raise UserError(f"the id {twice!r} is given twice: one row each")
        return vectors

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, the only one of all processes."""
        with writing(self.folder):
            try:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    self.refresh()
                    yield self._database
                    self._database.execute("COMMIT")
                except BaseException:
                    if self._database.in_transaction:  # SQLite ends it itself where the disk is full
                        self._database.execute("ROLLBACK")
                    raise
                finally:
                    self._read()
            except sqlite3.OperationalError as exc:
                raise UserError(f"cannot write {self.folder}: {exc}") from exc

    def _forget(self, database: sqlite3.Connection, ids: list[str]) -> int:
        numbers = [
            found for id in ids if (found := database.execute("SELECT number FROM rows WHERE id = ?", (id,)).fetchone())
        ]
        for table in ("rows", "thumbnails"):
            database.executemany(f"DELETE FROM {table} WHERE number = ?", numbers)
        database.executemany("INSERT INTO free VALUES (?)", numbers)
        return len(numbers)


def _write(path: Path, first: int, vectors: NDArray[np.float32]) -> None:
    """Writes vectors from slot `first` on and waits for the disk."""
    with path.open("r+b") as file:
        file.seek(first * vectors.itemsize * vectors.shape[1])
        file.write(vectors.data.cast("B"))
        file.flush()
        os.fsync(file.fileno())


def _contains(text: object, part: object) -> bool | None:
    return None if text is None or part is None else str(part).casefold() in str(text).casefold()


def _authorizer() -> Callable[..., int]:
    """SQLite's authorizer for one condition of `select`: it may read rows and call the functions above."""
    selects = 0

    def authorize(action: int, first: str | None, second: str | None, *_: object) -> int:
        nonlocal selects
        allowed = False
        if action == sqlite3.SQLITE_FUNCTION:
            allowed = second in _FUNCTIONS
        elif action == sqlite3.SQLITE_READ:
            allowed = first == "rows"
        elif action == sqlite3.SQLITE_SELECT:
            selects += 1
            allowed = selects <= _SELECTS
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    return authorize


def _is_left(file: Path) -> bool:
    """Whether a `create` that was killed leaves such a file."""
    return file.name == EMBEDDINGS_FILE or file.name.startswith(f".{ROWS_FILE}.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:12]}...{text[-8:]}"
