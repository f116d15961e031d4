"""Launch configurations of the Triton kernels, and times of the backends: shipped, or from the file of a tuned GPU.

`config` and `times` only look up. `CONFIGS` in the kernels' files were chosen to compile without spilled registers, and
`predicted.py` has predicted times. `python -m evakernels.tuning run` measures, and writes the GPU's file.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..triton import FAMILIES
from .predicted import MICROSECONDS

FOLDER = Path(__file__).parent

SIZES = ("width", "depth", "head_dim", "tokens", "heads", "itemsize")
"""Sizes of calls; `heads` are those of all samples, `itemsize` is the bytes of an element."""

TIMES = " on"
"""Suffix of an op's name in a file: the key of its times; their `config` has microseconds by backend."""

Entry = dict[str, dict[str, int]]
"""`shape`, the sizes of a configuration, and `config`, the keyword arguments of the launch."""


class Times(NamedTuple):
    """Microseconds of an op by backend, at the nearest known sizes."""

    shape: Mapping[str, int]
    microseconds: Mapping[str, float]
    is_measured: bool

    def __str__(self) -> str:
        """`cuda 210 us, triton 250 us, predicted for head_dim 64, tokens 257, heads 4096`."""
        order = sorted(self.microseconds, key=lambda backend: self.microseconds[backend])
        found = ", ".join(f"{backend} {self.microseconds[backend]:.3g} us" for backend in order)
        sizes = ", ".join(f"{name} {size}" for name, size in self.shape.items())
        return f"{found}, {'measured' if self.is_measured else 'predicted'} for {sizes}"


_forced: dict[str, Mapping[str, int]] = {}


def config(op: str, shape: Mapping[str, int], tensor: Tensor) -> dict[str, int]:
    """The keyword arguments for a launch of `op` at this shape, in the tensor's dtype.

    They are those of the entry with the smallest sum of |log ratio| over its sizes, among equals with the most sizes.
    """
    found = _forced.get(op) or _nearest(op, tuple(sorted(shape.items())), tensor.dtype.itemsize, gpu_of(tensor))
    return {**found, "enable_fp_fusion": True}  # Triton 3.10 changes the default


def entry(**values: int) -> Entry:
    """The entry of these sizes (`SIZES`) and keyword arguments of a launch."""
    shape = {name: value for name, value in values.items() if name in SIZES}
    return {"shape": shape, "config": {name: value for name, value in values.items() if name not in SIZES}}


def times(op: str, arguments: Mapping[str, Any], tensor: Tensor) -> Times | None:
    """The times of the nearest sizes on the tensor's GPU; None if there are none."""
    shape = sizes_of(op, arguments, tensor)
    # The first tensor of a loss's backward pass is in float32.
    itemsize = arguments.get("image", tensor).dtype.itemsize
    return _times(op, tuple(shape.items()), itemsize, gpu_of(tensor))


def sizes_of(op: str, arguments: Mapping[str, Any], tensor: Tensor) -> dict[str, int]:
    """The sizes of a call by which times are looked up; `tensor` is its first one."""
    width = tensor.shape[-1] if tensor.dim() else 1
    if "contrastive" in op or "siglip" in op:
        return {"depth": arguments["image"].shape[-1] if "image" in arguments else width}
    if "attention" not in op:
        return {"width": width}
    tokens = max(1, arguments["max_seqlen"] if "max_seqlen" in arguments else tensor.shape[1])
    return {"head_dim": width, "tokens": tokens, "heads": max(1, tensor.numel() // (tokens * max(1, width)))}


@contextmanager
def forced(op: str, config: Mapping[str, int]) -> Iterator[None]:
    """Launches every call of `op` with this configuration inside the `with` block."""
    _forced[op] = config
    try:
        yield
    finally:
        del _forced[op]


def gpu_of(tensor: Tensor) -> tuple[str, int]:
    """Name and compute capability (90 for 9.0) of the tensor's GPU; for interpreted kernels an H100's."""
    return _gpu(tensor.device.index) if tensor.is_cuda else ("", 90)


@cache
def _gpu(device: int) -> tuple[str, int]:
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), 10 * major + minor


@cache
def _nearest(op: str, shape: tuple[tuple[str, int], ...], itemsize: int, gpu: tuple[str, int]) -> Mapping[str, int]:
    return _nearest_of(table(*gpu)[op], shape, itemsize)["config"]


@cache
def _times(op: str, shape: tuple[tuple[str, int], ...], itemsize: int, gpu: tuple[str, int]) -> Times | None:
    name, capability = gpu
    own = FOLDER / f"{file_name(name)}.json"
    measured = read(own).get(op + TIMES) if name and own.exists() else None
    known = max((known for known in MICROSECONDS if known <= capability), default=None)
    entries = measured or (MICROSECONDS[known].get(op) if known else None)
    if not entries:
        return None
    found = _nearest_of(entries, shape, itemsize)
    return Times(found["shape"], found["config"], bool(measured))


def _nearest_of(entries: list[Entry], shape: tuple[tuple[str, int], ...], itemsize: int) -> Entry:
    wanted = dict(shape) | {"itemsize": itemsize}

    def distance(entry: Entry) -> tuple[float, int]:
        sizes = entry["shape"].items()
        return sum(abs(math.log(size / max(1, wanted[name]))) for name, size in sizes), -len(sizes)

    return min(entries, key=distance)


def clear_caches() -> None:
    """Forgets the files that were read."""
    for cached in (table, _nearest, _times):
        cached.cache_clear()


@cache
def shipped() -> dict[int, dict[str, list[Entry]]]:
    """The entries in the kernels' files, by compute capability and op."""
    found: dict[int, dict[str, list[Entry]]] = {}
    for family in FAMILIES:
        for capability, entries in import_module(f"..triton.{family}", __package__).CONFIGS.items():
            found.setdefault(capability, {}).update(entries)
    return dict(sorted(found.items()))


@cache
def table(name: str, capability: int) -> dict[str, list[Entry]]:
    """The entries of a GPU by op: from its own file, or of the highest capability up to its own."""
    fitting = [known for known in shipped() if known <= capability] or [min(shipped())]
    found = {op: entries for known in fitting for op, entries in shipped()[known].items()}
    own = FOLDER / f"{file_name(name)}.json"
    return found | read(own) if name and own.exists() else found


def file_name(gpu: str) -> str:
    """`nvidia_h100_80gb_hbm3` for "NVIDIA H100 80GB HBM3"."""
    return "_".join(gpu.lower().split())


def read(path: Path) -> dict[str, list[Entry]]:
    """The entries of a file by op."""
    content: dict[str, list[Entry]] = json.loads(path.read_text())
    return content
