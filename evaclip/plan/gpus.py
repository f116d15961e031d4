"""What is known of GPUs, from `gpus.json`."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from evaclip.errors import unknown_name

PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, in nodes of eight.

    Attributes:
        memory_gib: what a program can have of it.
        half_tflops, single_tflops: dense rate of products in 16 bits and in float32.
        memory_gbps: of its own memory, in GB/s.
        node_gbps: GB/s from one GPU to the others of its node, in one direction.
        network_gbps: GB/s of a whole node to other nodes: from what slow to what fast clusters have.
        source: where the numbers are from.
        beside_gib: what else it holds than tensors, from the least to the most: the CUDA context, buffers of NCCL and
            cuBLAS, and what the allocator can't use. Assumed, until `evaclip train --dry-run` has measured it.
    """

    name: str
    memory_gib: float
    half_tflops: float
    single_tflops: float
    memory_gbps: float
    node_gbps: float
    network_gbps: tuple[float, float]
    source: str
    beside_gib: tuple[float, float] = (2.0, 4.0)

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.memory_gib * 2**30)


@cache
def gpus() -> dict[str, Gpu]:
    """All that are known, by their short names."""
    entries = json.loads((files("evaclip.plan") / "gpus.json").read_text(encoding="utf-8"))
    return {name: Gpu(**{**entry, "network_gbps": tuple(entry["network_gbps"])}) for name, entry in entries.items()}


def get_gpu(name: str) -> Gpu:
    """The GPU called `name`.

    Raises:
        UserError: for an unknown name, with the nearest known ones.
    """
    if name not in gpus():
        raise unknown_name("GPU", name, gpus())
    return gpus()[name]
