"""Tensors in parts: what each process holds of them in a file of its own, and an index of all.

FOLDER/00000.safetensors  00001.safetensors ...  index.json

A tensor is cut by rows as `fully_shard` cuts it: `count` processes have ceil(rows / count) each, the last of them fewer
or none. So `{"files": N, "tensors": {NAME: {"dtype", "shape", "files": [first, count]}}}` tells of any rows in which
files they are, at any number of processes, in as many bytes as a list of the tensors. Each file says of its parts where
they begin, as torch's distributed checkpointing does, which reads these folders too.
"""

import fcntl
import hashlib
import json
import mmap
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaclip.atomic import replacing, write_json, writing
from evaclip.errors import UserError
from evaclip.run_files import META_FILE, PARTS
from evaclip.weights.shards import first_row, is_cut

INDEX = "index.json"
PLACES = "DCP_SHARDING_INFO"
"""Where the place of each part is noted, in the metadata of a file, by torch's writer too."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_NAMED = {name: dtype for dtype, name in DTYPES.items()}
_JOINED = "joined.json"
"""The size and the hash of the file that was made of the parts."""


class _Part(NamedTuple):
    """Rows of a tensor, from `first` on, in a mapped file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    data: memoryview

    @property
    def rows(self) -> int:
        return _rows(self.shape)


@dataclass(frozen=True)
class _Index:
    """What is in a folder: tensors on the meta device, and the first of their files and how many they are."""

    files: list[Path]
    tensors: dict[str, Tensor]
    places: dict[str, tuple[int, int]]

    def holding(self, name: str, begin: int, end: int) -> list[Path]:
        """The files in which rows `begin` to `end` of a tensor are."""
        if begin == end:
            return []
        first, count = self.places[name]
        step = -(-_rows(self.tensors[name].shape) // count)
        return self.files[first + begin // step : first + (end - 1) // step + 1]


def parts_of(path: Path) -> Path:
    """Where the parts are that `path` can be joined of."""
    return path.with_name(path.name + PARTS)


def part_name(number: int) -> str:
    return f"{number:05d}.safetensors"


def is_there(path: Path) -> bool:
    """Whether a weights file is there, whole or in parts."""
    return path.is_file() or parts_of(path).is_dir()


def likes(folder: Path) -> dict[str, Tensor]:
    """Tensors without values, on the meta device, like those in `folder`."""
    return _read_index(folder).tensors


@torch.no_grad()
def read(targets: Mapping[str, Tensor], folder: Path) -> None:
    """Fills tensors or DTensors from the parts in `folder`, of which it opens those that hold rows of them.

    Raises:
        UserError: a tensor isn't there, or has another shape.
        OSError: the files don't hold all rows, or can't be read.
    """
    index = _read_index(folder)
    wanted: dict[Path, dict[str, tuple[Tensor, int]]] = defaultdict(dict)
    missing = {}
    for name, target in targets.items():
        like = index.tensors.get(name)
        if like is None or like.shape != target.shape:
            had = "isn't there" if like is None else f"is {list(like.shape)}"
            raise UserError(f"{name} {had} in {str(folder)!r}; expected {list(target.shape)}")
        local, begin = (target.to_local() if is_cut(target) else target), first_row(target)
        local = local if local.ndim else local.reshape(1)
        missing[name] = len(local)
        for path in index.holding(name, begin, begin + len(local)):
            wanted[path][name] = local, begin
    for path, held in wanted.items():
        for part in _parts(path):
            if part.name in held:
                missing[part.name] -= _copy(part, *held[part.name])
    _require_all(folder, missing)


def _copy(part: _Part, local: Tensor, begin: int) -> int:
    """Copies what `local`, the rows of a tensor from `begin` on, shares with a part; returns how many rows."""
    first, last = max(begin, part.first), min(begin + len(local), part.first + part.rows)
    if first >= last:
        return 0
    values = torch.frombuffer(part.data, dtype=part.dtype).view(part.rows, *part.shape[1:])
    local[first - begin : last - begin].copy_(values[first - part.first : last - part.first])
    return last - first


def joined(path: Path) -> Path:
    """`path`; where only its parts are there, it is made of them first, complete or not at all.

    Processes on one machine wait for the one that does it. Where the file system knows no locks each makes a file of
    its own, and they are equal.

    Raises:
        UserError: a part is missing or isn't what was written, or the file can't be written.
    """
    folder = parts_of(path)
    if path.is_file() or not folder.is_dir():
        return path
    with writing(path), (folder / INDEX).open("rb") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            print(f"joining the parts of {path}, once for all who read it", file=sys.stderr, flush=True)
            with replacing(path) as temporary:
                join(folder, temporary, _checks(path.parent))
                write_json(folder / _JOINED, fingerprint(temporary))
    return path


def join(folder: Path, path: Path, check: Callable[[Path], None] = lambda part: None) -> None:
    """Puts all tensors in `folder` whole into one safetensors file, and flushes it to the disk.

    Each file of the folder is opened once and each part goes straight to its place, so no tensor is ever whole in
    memory. The file is the same from any number of processes.

    Args:
        check: is called with each file before it is read.

    Raises:
        OSError: the parts don't make up the tensors of the index, or can't be read or written.
    """
    index = _read_index(folder)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    rows: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}  # what they are, where they begin, bytes of one
    missing = {}
    end = 0
    for name, whole in sorted(index.tensors.items()):
        start, end, missing[name] = end, end + whole.nbytes, _rows(whole.shape)
        header[name] = {"dtype": DTYPES[whole.dtype], "shape": list(whole.shape), "data_offsets": [start, end]}
        rows[name] = whole.dtype, tuple(whole.shape[1:]), start, whole.nbytes // max(1, missing[name])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with path.open("wb", buffering=0) as file:
        _write_at(file.fileno(), 0, memoryview(len(text).to_bytes(8, "little") + text))
        for source in index.files:
            check(source)
            for part in _parts(source):
                dtype, shape, start, size = rows.get(part.name, (None, (), 0, 0))
                if (part.dtype, part.shape[1:]) != (dtype, shape):
                    raise OSError(f"{source} has a part of {part.name} that doesn't belong to what {INDEX} names")
                missing[part.name] -= part.rows
                _write_at(file.fileno(), begin + start + part.first * size, part.data)
        _require_all(folder, missing)
        os.fsync(file.fileno())


def _write_at(file: int, at: int, data: memoryview) -> None:
    while data:  # a call writes 2 GiB at the most
        written = os.pwrite(file, data, at)
        at, data = at + written, data[written:]


def fingerprint(path: Path) -> dict[str, Any]:
    """The size of a file and its SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def damage(folder: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with a file, of which `fingerprint` gave `expected`; None if nothing is."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{name} has {path.stat().st_size} bytes, {expected['bytes']} were written"
    if fingerprint(path) != expected:
        return f"the contents of {name} have changed since they were written"
    return None


def joined_fingerprint(path: Path) -> Mapping[str, Any] | None:
    """What `fingerprint` gave of `path` when it was joined; None if it hasn't been."""
    record = parts_of(path) / _JOINED
    return json.loads(record.read_text(encoding="utf-8")) if path.is_file() and record.is_file() else None


def _checks(checkpoint: Path) -> Callable[[Path], None]:
    """A check of a file against what the checkpoint says that it was; of a folder that says nothing, none."""
    known = {}
    with suppress(OSError, ValueError, KeyError):
        known = json.loads((checkpoint / META_FILE).read_text(encoding="utf-8"))["files"]

    def check(path: Path) -> None:
        name = str(path.relative_to(checkpoint))
        if name in known and (problem := damage(checkpoint, name, known[name])):
            raise UserError(f"the checkpoint {str(checkpoint)!r} is damaged: {problem}")

    return check


def _require_all(folder: Path, missing: Mapping[str, int]) -> None:
    if wrong := [name for name, rows in missing.items() if rows]:
        raise OSError(f"the parts in {folder} don't make up {len(wrong)} of {len(missing)} tensors, such as {wrong[0]}")


def _read_index(folder: Path) -> _Index:
    found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    files = [folder / part_name(number) for number in range(found["files"])]
    about = found["tensors"]
    tensors = {
        name: torch.empty(entry["shape"], dtype=_NAMED[entry["dtype"]], device="meta") for name, entry in about.items()
    }
    return _Index(files, tensors, {name: tuple(entry["files"]) for name, entry in about.items()})


def _parts(path: Path) -> Iterator[_Part]:
    with path.open("rb") as file:
        # Private: torch warns of memory that it may not write to. Nobody does.
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(bytes(content[8 : 8 + size])), content[8 + size :]
    places = json.loads(header.pop("__metadata__", {}).get(PLACES, "{}"))
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if end > len(data):
            raise OSError(f"{path} ends before {name} does")
        offsets = places[name]["saved_offsets"] if name in places else ()
        shape = tuple(entry["shape"])
        yield _Part(name, _NAMED[entry["dtype"]], shape, offsets[0] if offsets else 0, data[begin:end])


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1
