"""Sharded tensors and models (DTensors), and tensors saved in shards: one file per rank, and an index.

FOLDER/00000.safetensors  00001.safetensors ...  index.json

A tensor is split by rows as `fully_shard` splits it: each of `count` ranks has ceil(rows / count), the last ranks fewer
or none. So `{"files": N, "tensors": {NAME: {"dtype", "shape", "files": [first, count]}}}` locates any rows, for any
number of ranks. The metadata of each file has the first row of each shard, in the format of torch's distributed
checkpointing, which reads these folders too.
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
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from evaclip.atomic import flock, replacing, write_json, writing
from evaclip.errors import UserError
from evaclip.runs.files import META_FILE, SHARDS_SUFFIX

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

INDEX = "index.json"
PLACES = "DCP_SHARDING_INFO"
"""Key of the shards' offsets in the metadata of a file, as in files of torch."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_NAMED = {name: dtype for dtype, name in DTYPES.items()}
_JOINED = "joined.json"
"""Size and hash of the joined file."""


def put(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """`module.load_state_dict(state)` for whole tensors, of which each rank takes its shard."""
    like = module.state_dict()
    module.load_state_dict({n: shard_like(t, like[n]) if n in like else t for n, t in state.items()}, strict=strict)


def is_sharded(module: nn.Module) -> bool:
    """Whether a module has a sharded parameter."""
    return any(is_dtensor(parameter) for parameter in module.parameters())


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """The shard of a whole tensor, sharded like `like`; the tensor itself if `like` is whole. Reads only the shard."""
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(like, DTensor)
    mesh, local = like.device_mesh, whole
    for dim, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            shards = local.chunk(mesh.size(dim), placement.dim)
            index = mesh.get_local_rank(dim)
            local = shards[index] if index < len(shards) else local.narrow(placement.dim, 0, 0)
    shard: DTensor = DTensor.from_local(
        local.to(like.device), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return shard


def first_row(tensor: Tensor) -> int:
    """First row of this rank's shard in the whole tensor; 0 for a whole tensor.

    Raises:
        NotImplementedError: it isn't sharded by rows over one mesh dimension.
    """
    if not is_dtensor(tensor):
        return 0
    from torch.distributed.tensor import Shard

    mesh, shards = tensor.device_mesh, [dim for dim, how in enumerate(tensor.placements) if isinstance(how, Shard)]
    if len(shards) > 1 or any(tensor.placements[dim] != Shard(0) for dim in shards):
        raise NotImplementedError(f"placements must be Shard(0) or Replicate(), got {tensor.placements}")
    rows = tensor.shape[0]
    return max((min(rows, mesh.get_local_rank(dim) * -(-rows // mesh.size(dim))) for dim in shards), default=0)


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor."""
    # The import takes half a second; without it there is no DTensor.
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


class _Shard(NamedTuple):
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
    """Tensors of a folder on the meta device, and the first file and the number of files of each."""

    files: list[Path]
    tensors: dict[str, Tensor]
    places: dict[str, tuple[int, int]]

    def files_of(self, name: str, begin: int, end: int) -> list[Path]:
        """Files with rows `begin` to `end` of a tensor."""
        if begin == end:
            return []
        first, count = self.places[name]
        step = -(-_rows(self.tensors[name].shape) // count)
        return self.files[first + begin // step : first + (end - 1) // step + 1]


def shards_folder(path: Path) -> Path:
    """Folder of the shards of a weights file."""
    return path.with_name(path.name + SHARDS_SUFFIX)


def shard_name(number: int) -> str:
    """File name of a rank's shards."""
    return f"{number:05d}.safetensors"


def has_weights(path: Path) -> bool:
    """Whether a weights file exists, whole or in shards."""
    return path.is_file() or shards_folder(path).is_dir()


def read_metadata(folder: Path) -> dict[str, Tensor]:
    """The tensors in `folder` on the meta device, without values."""
    return _read_index(folder).tensors


@torch.no_grad()
def read(targets: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors or DTensors from the shards in `folder`; opens only files with rows of them.

    Raises:
        UserError: a tensor is missing or has another shape.
        OSError: rows are missing, or a file can't be read.
    """
    index = _read_index(folder)
    targets_of: dict[Path, dict[str, tuple[Tensor, int]]] = defaultdict(dict)
    missing = {}
    for name, target in targets.items():
        like = index.tensors.get(name)
        if like is None or like.shape != target.shape:
            got = "none" if like is None else list(like.shape)
            raise UserError(f"{name} must have shape {list(target.shape)}, got {got} in {str(folder)!r}")
        local, begin = (target.to_local() if is_dtensor(target) else target), first_row(target)
        local = local if local.ndim else local.reshape(1)
        missing[name] = len(local)
        for path in index.files_of(name, begin, begin + len(local)):
            targets_of[path][name] = local, begin
    for path, held in targets_of.items():
        for shard in _read_shards(path):
            if shard.name in held:
                missing[shard.name] -= _copy(shard, *held[shard.name])
    _require_all(folder, missing)


def _copy(shard: _Shard, local: Tensor, begin: int) -> int:
    """Copy the common rows of a shard and of `local`, the rows from `begin` on; returns their number."""
    first, last = max(begin, shard.first), min(begin + len(local), shard.first + shard.rows)
    if first >= last:
        return 0
    values = torch.frombuffer(shard.data, dtype=shard.dtype).view(shard.rows, *shard.shape[1:])
    local[first - begin : last - begin].copy_(values[first - shard.first : last - shard.first])
    return last - first


def ensure_joined(path: Path) -> Path:
    """`path`, which is joined from its shards first if only they exist, complete or not at all.

    Processes on one machine wait for the first. On a file system without locks each joins; the files are equal.

    Raises:
        UserError: a shard is missing or damaged, or the file can't be written.
    """
    folder = shards_folder(path)
    if path.is_file() or not folder.is_dir():
        return path
    with writing(path), (folder / INDEX).open("rb") as lock:
        with suppress(OSError):
            flock(lock.fileno(), fcntl.LOCK_EX)
        if not path.is_file():
            print(f"joining the shards of {path}, once for all readers", file=sys.stderr, flush=True)
            with replacing(path) as temporary:
                join(folder, temporary, _checks(path.parent))
                write_json(folder / _JOINED, fingerprint(temporary))
    return path


def join(folder: Path, path: Path, check: Callable[[Path], None] = lambda shard: None) -> None:
    """Write all tensors in `folder` whole into one safetensors file, and flush it to the disk.

    Each shard is written straight to its offset, so no tensor is ever whole in memory. The file doesn't depend on the
    number of ranks.

    Args:
        check: called with each file before it is read.

    Raises:
        OSError: the shards don't make up the tensors of the index, or can't be read or written.
    """
    index = _read_index(folder)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    rows: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}  # dtype, shape of a row, offset, bytes of a row
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
            for shard in _read_shards(source):
                dtype, shape, start, size = rows.get(shard.name, (None, (), 0, 0))
                if (shard.dtype, shard.shape[1:]) != (dtype, shape):
                    raise OSError(f"{source} has a shard of {shard.name} that doesn't fit {INDEX}")
                missing[shard.name] -= shard.rows
                _write_at(file.fileno(), begin + start + shard.first * size, shard.data)
        _require_all(folder, missing)
        os.fsync(file.fileno())


def _write_at(file: int, at: int, data: memoryview) -> None:
    while data:  # a call writes at most 2 GiB
        written = os.pwrite(file, data, at)
        at, data = at + written, data[written:]


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def damage(folder: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    """Difference between a file and its `fingerprint` `expected`; None if there is none."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{name} has {path.stat().st_size} bytes, {expected['bytes']} were written"
    if fingerprint(path) != expected:
        return f"the contents of {name} have changed since they were written"
    return None


def joined_fingerprint(path: Path) -> Mapping[str, Any] | None:
    """The `fingerprint` of `path` when it was joined; None if it wasn't."""
    record = shards_folder(path) / _JOINED
    return json.loads(record.read_text(encoding="utf-8")) if path.is_file() and record.is_file() else None


def _checks(checkpoint: Path) -> Callable[[Path], None]:
    """A function that compares a file with the checkpoint's fingerprint, if it has one."""
    files = {}
    with suppress(OSError, ValueError, KeyError):
        files = json.loads((checkpoint / META_FILE).read_text(encoding="utf-8"))["files"]

    def check(path: Path) -> None:
        name = str(path.relative_to(checkpoint))
        if name in files and (problem := damage(checkpoint, name, files[name])):
            raise UserError(f"the checkpoint {str(checkpoint)!r} is damaged: {problem}")

    return check


def _require_all(folder: Path, missing: Mapping[str, int]) -> None:
    if wrong := [name for name, rows in missing.items() if rows]:
        raise OSError(
            f"the shards in {folder} don't make up {len(wrong)} of {len(missing)} tensors, such as {wrong[0]}"
        )


def _read_index(folder: Path) -> _Index:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    files = [folder / shard_name(number) for number in range(index["files"])]
    entries = index["tensors"]
    tensors = {
        name: torch.empty(entry["shape"], dtype=_NAMED[entry["dtype"]], device="meta")
        for name, entry in entries.items()
    }
    return _Index(files, tensors, {name: tuple(entry["files"]) for name, entry in entries.items()})


def _read_shards(path: Path) -> Iterator[_Shard]:
    with path.open("rb") as file:
        # A private mapping: torch warns of memory that isn't writable.
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
        yield _Shard(name, _NAMED[entry["dtype"]], shape, offsets[0] if offsets else 0, data[begin:end])


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1
