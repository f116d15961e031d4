"""Launch configurations of the Triton kernels, and orders of the backends: shipped, or measured on this machine.

`CONFIGS` in the kernels' files were chosen to compile without spilled registers. `python -m evakernels.tuning run`
measures configurations and backends, and writes a file for the GPU into `folder()`.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..triton import FAMILIES

SIZES = ("width", "depth", "head_dim", "tokens", "matmuls", "itemsize")
"""Sizes of calls; `matmuls` is the number of a loss's matmuls, `itemsize` the bytes of an element."""

ORDER = "order of "
"""Prefix of an op's name in a file: the key of its GPU backends, the faster one first."""

Entry = dict[str, dict[str, int]]
"""`shape`, the sizes of a configuration, and `config`, the keyword arguments of the launch."""

_forced: ContextVar[tuple[str, Mapping[str, int]] | None] = ContextVar("forced", default=None)


def folder() -> Path:
    """Where measured files are: `$EVAKERNELS_TUNING`, else `evakernels/tuning` in the user's cache folder."""
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("EVAKERNELS_TUNING") or cache_folder / "evakernels" / "tuning").expanduser()


def config(op: str, shape: Mapping[str, int], tensor: Tensor) -> dict[str, int]:
    """The keyword arguments for a launch of `op` at this shape, in the tensor's dtype.

    They are those of the entry with the smallest sum of |log ratio| over the sizes in `shape` and `itemsize`, among
    equals with the most sizes.
    """
    forced_op, options = _forced.get() or ("", {})
    if forced_op != op:
        options = _nearest(op, tuple(sorted(shape.items())), tensor.dtype.itemsize, find_gpu(tensor))
    return {**options, "enable_fp_fusion": True}  # Triton 3.10 changes the default


def entry(**values: int) -> Entry:
    """The entry of these sizes (`SIZES`) and keyword arguments of a launch."""
    shape = {name: value for name, value in values.items() if name in SIZES}
    return {"shape": shape, "config": {name: value for name, value in values.items() if name not in SIZES}}


def measured_order(op: str, gpu: str, capability: int) -> tuple[str, ...]:
    """The GPU backends of an op, the faster one first; empty if they weren't measured on this GPU."""
    return tuple(table(gpu, capability).get(ORDER + op, ()))


@contextmanager
def forced(op: str, config: Mapping[str, int]) -> Iterator[None]:
    """Launches this thread's calls of `op` with this configuration inside the `with` block."""
    token = _forced.set((op, config))
    try:
        yield
    finally:
        _forced.reset(token)


def find_gpu(tensor: Tensor) -> tuple[str, int]:
    """Name and compute capability (90 for 9.0) of the tensor's GPU; for interpreted kernels an H100's."""
    return _gpu(tensor.device.index) if tensor.is_cuda else ("", 90)


@cache
def _gpu(device: int) -> tuple[str, int]:
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), 10 * major + minor


@cache
def _nearest(op: str, shape: tuple[tuple[str, int], ...], itemsize: int, gpu: tuple[str, int]) -> Mapping[str, int]:
    target = dict(shape) | {"itemsize": itemsize}

    def distance(entry: Entry) -> tuple[float, int]:
        sizes = [(size, target[name]) for name, size in entry["shape"].items() if name in target]
        return sum(abs(math.log(size / max(1, near))) for size, near in sizes), -len(sizes)

    nearest: Entry = min(table(*gpu)[op], key=distance)
    return nearest["config"]


def clear_caches() -> None:
    """Forgets the files that were read, and the backends that were chosen by them."""
    table.cache_clear()
    _nearest.cache_clear()
    backends.choices.clear()


@cache
def shipped() -> dict[int, dict[str, list[Entry]]]:
    """The entries in the kernels' files, by compute capability and op."""
    result: dict[int, dict[str, list[Entry]]] = {}
    for family in FAMILIES:
        for capability, entries in import_module(f"..triton.{family}", __package__).CONFIGS.items():
            result.setdefault(capability, {}).update(entries)
    return dict(sorted(result.items()))


@cache
def table(name: str, capability: int) -> dict[str, list[Any]]:
    """The entries of a GPU by op, of the highest capability up to its own, with what its file has in their place."""
    fitting = [level for level in shipped() if level <= capability] or [min(shipped())]
    result: dict[str, list[Any]] = {op: entries for level in fitting for op, entries in shipped()[level].items()}
    path = gpu_file(name)
    return result | json.loads(path.read_text()) if name and path.exists() else result


def gpu_file(gpu: str) -> Path:
    """`nvidia_h100_80gb_hbm3.json` in `folder()` for "NVIDIA H100 80GB HBM3"."""
    return folder() / f"{'_'.join(gpu.lower().split())}.json"
