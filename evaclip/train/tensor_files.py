"""Write tensors by name into safetensors files: whole, or each rank's shards into its own file."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from evaclip.weights.files import save_file
from evaclip.weights.parts import DTYPES, INDEX, PLACES, first_row, is_cut, part_name


def write_whole(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes one file; this process has all tensors whole."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def write_parts(tensors: Mapping[str, Tensor], folder: Path, rank: int, size: int) -> None:
    """Writes what the process `rank` of `size` holds into its file in `folder`, and the first one the index.

    All of them call this; none asks another, as what each has follows from the tensors. Replicas of cut tensors take
    turns, and what isn't cut is the first one's.

    Args:
        tensors: DTensors cut by rows, and others that are equal in all processes.
    """
    own, places, about = {}, {}, {}
    turns = 0
    for name, tensor in sorted(tensors.items()):
        first, count = 0, 1
        if is_cut(tensor):
            count = max(tensor.device_mesh.size(dim) for dim, how in enumerate(tensor.placements) if how.is_shard())
            first = turns % (size // count) * count
            turns += 1
        about[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "files": [first, count]}
        if first <= rank < first + count:
            own[name] = (tensor.to_local() if is_cut(tensor) else tensor).detach().contiguous()
            places[name] = {"saved_offsets": [first_row(tensor), *[0] * tensor.ndim][: tensor.ndim]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(own, folder / part_name(rank), {PLACES: json.dumps(places), "format": "pt"})
    if rank == 0:
        (folder / INDEX).write_text(json.dumps({"files": size, "tensors": about}), encoding="utf-8")


def is_complete(path: Path) -> bool:
    """Whether a file has all the bytes that its header promises."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
