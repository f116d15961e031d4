"""Tensors by name in a folder of safetensors files: whole ones, or what each process holds of them.

Torch's distributed checkpointing writes and reads them, in its form of Hugging Face's files: nothing in it is
unpickled, and any number of processes reads what any other wrote. It is imported where it is used: that takes more
than a second, and a run in one process that begins anew needs none of it.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from itertools import product, zip_longest
from operator import mul
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_PLACES = "DCP_SHARDING_INFO"
"""Where torch's writer notes the place of each part, in the metadata of a file."""


def write_whole(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes one file; this process has all tensors whole."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def write_parts(tensors: Mapping[str, Tensor], folder: Path, group: Any) -> None:
    """Writes what each process of a group holds into files of its own in `folder`; all processes call this.

    Args:
        tensors: DTensors, and others that are equal in all processes.

    Raises:
        OSError: in every process, when one of them can't write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(
            dict(tensors),
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            process_group=group,
        )
    except CheckpointException as exc:  # a BaseException
        rank, (reason, _) = next(iter(exc.failures.items()))
        raise OSError(f"process {rank} could not write {folder}: {reason}") from exc


def is_complete(path: Path) -> bool:
    """Whether a file has all the bytes that its header promises."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def empty(folder: Path) -> dict[str, Tensor]:
    """Tensors without values, on the meta device, like those in `folder`."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(about.size, dtype=about.properties.dtype, device="meta")  # type: ignore[union-attr]
        for name, about in found.items()
    }


def read(targets: dict[str, Tensor], folder: Path) -> None:
    """Fills tensors or DTensors from the files in `folder`; of a DTensor what this process holds."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    # Each process reads for itself: nothing is to be agreed on, and none waits for another. Torch warns of that.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def join(folder: Path, path: Path, likes: Mapping[str, Tensor]) -> None:
    """Puts all tensors in `folder` whole into one safetensors file.

    Each file of the folder is opened once and each part goes straight to its place, so no tensor is ever whole in
    memory. Torch's `consolidate_safetensors_files` opens all files at once, and writes zeros for tensors without
    dimensions (2.13).

    Args:
        likes: tensors of any device with the names, the dtypes and the whole shapes of those in `folder`; what
            `write_parts` was given.

    Raises:
        OSError: the parts in `folder` don't make up these tensors, or can't be read or written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, like in sorted(likes.items()):
        start, end = end, end + like.shape.numel() * like.dtype.itemsize
        header[name] = {"dtype": _DTYPES[like.dtype], "shape": list(like.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    missing = {name: like.shape.numel() for name, like in likes.items()}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        first = file.tell()
        for name, offsets, part in _parts(folder):
            if name not in likes or part.dtype != likes[name].dtype:
                raise OSError(
                    f"{folder} has parts of {name} as {part.dtype}, which the tensors to be joined don't have"
                )
            missing[name] -= part.numel()
            _put(part, offsets, likes[name].shape, file, first + header[name]["data_offsets"][0])
    if wrong := [name for name, count in missing.items() if count]:
        raise OSError(f"the parts in {folder} don't make up {len(wrong)} of {len(likes)} tensors, such as {wrong[0]}")


def _parts(folder: Path) -> Iterator[tuple[str, list[int], Tensor]]:
    """Name, place in the whole tensor and values of all parts, one file after the other; nothing is copied."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places = json.loads(file.metadata()[_PLACES])
            for name in file.keys():  # noqa: SIM118
                yield name, places[name]["saved_offsets"], file.get_tensor(name)


def _put(part: Tensor, offsets: list[int], shape: torch.Size, file: IO[bytes], start: int) -> None:
    """Writes a part of a tensor of this shape, which begins at byte `start`, in runs that lie together in both."""
    if not part.numel():  # of a process beyond the last row
        return
    strides = torch.empty(shape, device="meta").stride()
    cut = max((dim for dim, size in enumerate(part.shape) if size < shape[dim]), default=0)
    runs = part.reshape(part.shape[:cut].numel(), -1).view(torch.uint8).numpy()
    for index, run in zip(product(*map(range, part.shape[:cut])), runs, strict=True):
        where = [offset + inside for offset, inside in zip_longest(offsets, index, fillvalue=0)]
        file.seek(start + part.dtype.itemsize * sum(map(mul, where, strides)))
        file.write(run.data)
