"""Launch configurations of the Triton kernels, as data: one JSON file for each GPU.

`config` is a pure look-up: nothing is tuned at import or at the first call. A file named after a compute capability
(`sm_90.json`) holds the ops for which GPUs from there on differ from those before; its numbers were chosen by what
compiles without spilling registers, not by time.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent

_forced: dict[str, Mapping[str, int]] = {}


def config(op: str, shape: Mapping[str, int], tensor: Tensor) -> dict[str, int]:
    """The keyword arguments that `op`'s kernel is launched with for a call of this shape, in the tensor's dtype.

    The entry whose shape is nearest is taken: the one with the smallest sum of |log ratio| over its sizes;
    among equals, the one that names more of them.
    """
    found = _forced.get(op) or _nearest(op, tuple(sorted(shape.items())), tensor.dtype.itemsize, gpu_of(tensor))
    return {**found, "enable_fp_fusion": True}  # Triton 3.10 changes the default


@contextmanager
def forced(op: str, config: Mapping[str, int]) -> Iterator[None]:
    """Within the `with` block every call of `op` is launched with this configuration."""
    _forced[op] = config
    try:
        yield
    finally:
        del _forced[op]


def gpu_of(tensor: Tensor) -> tuple[str, int]:
    """Name and compute capability (major and minor in one number) of the tensor's GPU; where kernels are interpreted,
    those of an H100."""
    return _gpu(tensor.device.index) if tensor.is_cuda else ("", 90)


@cache
def _gpu(device: int) -> tuple[str, int]:
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), 10 * major + minor


@cache
def _nearest(op: str, shape: tuple[tuple[str, int], ...], itemsize: int, gpu: tuple[str, int]) -> Mapping[str, int]:
    wanted = dict(shape) | {"itemsize": itemsize}
    entries: list[dict[str, Any]] = table(*gpu)[op]

    def distance(entry: dict[str, Any]) -> tuple[float, int]:
        sizes = entry["shape"].items()
        return sum(abs(math.log(size / max(1, wanted[name]))) for name, size in sizes), -len(sizes)

    found: Mapping[str, int] = min(entries, key=distance)["config"]
    return found


@cache
def table(name: str, capability: int) -> dict[str, Any]:
    """The entries of a GPU by op: of its name's file, else of the highest capability, up to its own, that has any."""
    shared = {int(path.stem.removeprefix("sm_")): path for path in FOLDER.glob("sm_*.json")}
    fitting = [known for known in sorted(shared) if known <= capability] or [min(shared)]
    files = [shared[known] for known in fitting]
    own = FOLDER / f"{file_name(name)}.json"
    if name and own.exists():
        files.append(own)
    return {op: entries for file in files for op, entries in read(file).items()}


def file_name(gpu: str) -> str:
    """`nvidia_h100_80gb_hbm3` for "NVIDIA H100 80GB HBM3"."""
    return "_".join(gpu.lower().split())


def read(path: Path) -> dict[str, Any]:
    """The entries of a file by op."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content
