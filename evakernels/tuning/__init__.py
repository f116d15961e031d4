"""Launch configurations of the Triton kernels: `CONFIGS` in the kernels' files, or the file of a tuned GPU.

`config` only looks up. `CONFIGS` were chosen to compile without spilled registers. `python -m evakernels.tuning run`
measures, and writes the GPU's file.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from ..triton import FAMILIES

FOLDER = Path(__file__).parent

SIZES = ("width", "depth", "head_dim", "tokens", "itemsize")
"""Sizes of calls; `itemsize` is the bytes of an element."""

Entry = dict[str, dict[str, int]]
"""`shape`, the sizes of a configuration, and `config`, the keyword arguments of the launch."""

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
    wanted = dict(shape) | {"itemsize": itemsize}
    entries = table(*gpu)[op]

    def distance(entry: Entry) -> tuple[float, int]:
        sizes = entry["shape"].items()
        return sum(abs(math.log(size / max(1, wanted[name]))) for name, size in sizes), -len(sizes)

    return min(entries, key=distance)["config"]


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
