"""Launch configurations of the Triton kernels: the look-up in their files, and in the file of a GPU that was tuned.

`config` is a pure look-up: nothing is tuned at import or at the first call. `CONFIGS` in the kernels' files were chosen
by what compiles without spilling registers. `python -m evakernels.tuning run` measures, and writes a GPU's own file.
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
"""Of calls: the last is the bytes of an element, the others name what the kernels' files measure."""

Entry = dict[str, dict[str, int]]
"""The sizes that a configuration is for, `shape`, and the keyword arguments of a launch, `config`."""

_forced: dict[str, Mapping[str, int]] = {}


def config(op: str, shape: Mapping[str, int], tensor: Tensor) -> dict[str, int]:
    """The keyword arguments that `op`'s kernel is launched with for a call of this shape, in the tensor's dtype.

    The entry whose shape is nearest is taken: the one with the smallest sum of |log ratio| over its sizes;
    among equals, the one that names more of them.
    """
    found = _forced.get(op) or _nearest(op, tuple(sorted(shape.items())), tensor.dtype.itemsize, gpu_of(tensor))
    return {**found, "enable_fp_fusion": True}  # Triton 3.10 changes the default


def entry(**values: int) -> Entry:
    """The entry of these sizes (`SIZES`) and keyword arguments of a launch."""
    shape = {name: value for name, value in values.items() if name in SIZES}
    return {"shape": shape, "config": {name: value for name, value in values.items() if name not in SIZES}}


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
    """The entries of a GPU by op: of its name's file, else of the highest capability, up to its own, that has any."""
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
