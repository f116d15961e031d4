"""Memory and peak rates of GPUs."""

from dataclasses import dataclass

from evaclip.errors import unknown_name
from evaclip.train.throughput import TFLOPS

PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, in nodes of eight.

    Attributes:
        memory_gib: memory that a program can use, as torch reports it.
        half_tflops, single_tflops: dense peak of GEMMs in 16 bits and in float32, of `TFLOPS`.
        memory_gbps: bandwidth of its memory, in GB/s.
        node_gbps: bandwidth in each direction to the other GPUs of its node, NVLink or PCIe, in GB/s.
        network_gbps: bandwidth of its share of the node's network cards, in GB/s. An assumption.
        other_gib: memory that isn't tensors, least and most: CUDA context, workspaces of NCCL and cuBLAS, fragments.
            An assumption; `evaclip train --dry-run` measures it.
    """

    name: str
    memory_gib: float
    half_tflops: float
    single_tflops: float
    memory_gbps: float
    node_gbps: float
    network_gbps: float
    other_gib: tuple[float, float] = (2.0, 4.0)

    @property
    def room(self) -> int:
        """Bytes left for tensors if everything else takes the most that is assumed."""
        return int((self.memory_gib - self.other_gib[1]) * 2**30)


GPUS = {
    "a100-40g": Gpu("NVIDIA A100 40 GB SXM", 39.5, *TFLOPS["A100"], 1555, 300, 25),
    "a100-80g": Gpu("NVIDIA A100 80 GB SXM", 79.1, *TFLOPS["A100"], 2039, 300, 25),
    "h100-80g": Gpu("NVIDIA H100 80 GB SXM", 79.1, *TFLOPS["H100"], 3350, 450, 50),
    "h200": Gpu("NVIDIA H200 SXM", 139.8, *TFLOPS["H200"], 4800, 450, 50),
    "b200": Gpu("NVIDIA B200 SXM", 178.3, *TFLOPS["B200"], 8000, 900, 50),
    "l40s": Gpu("NVIDIA L40S", 44.4, *TFLOPS["L40S"], 864, 25, 12.5),
    "rtx-4090": Gpu("NVIDIA RTX 4090", 23.5, *TFLOPS["RTX 4090"], 1008, 25, 12.5),
}


def get_gpu(name: str) -> Gpu:
    """The GPU called `name`.

    Raises:
        UserError: `name` is unknown; the message has the nearest known names.
    """
    if name not in GPUS:
        raise unknown_name("GPU", name, GPUS)
    return GPUS[name]
