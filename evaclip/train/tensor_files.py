"""Tensors by name in a folder of safetensors files: whole ones, or what each process holds of them.

Torch's distributed checkpointing writes and reads them, in its form of Hugging Face's files: nothing in it is
unpickled, and any number of processes reads what any other wrote. It is imported where it is used: that takes more
than a second, and a run in one process that begins anew needs none of it.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


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


def join(folder: Path, path: Path) -> None:
    """Puts all tensors in `folder` whole into one safetensors file, with one of them in memory at a time.

    Torch's `consolidate_safetensors_files` would do, but writes zeros for tensors without dimensions (2.13).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    tensors = empty(folder)
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            value = torch.empty_like(tensor, device="cpu")
            read({name: value}, folder)
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
