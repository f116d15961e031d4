"""GPUs that the interpreter plays: sizes, and CUDA's occupancy."""

from dataclasses import dataclass

from .types import WARP

REGISTERS = 65_536
"""Registers of a multiprocessor."""
_PARTITIONS = 4
_REGISTER_UNIT, _SHARED_UNIT = 256, 128
_RESERVED_SHARED = 1024
"""Bytes of each block."""


@dataclass(frozen=True)
class Gpu:
    """A GPU (CUDA C++ Programming Guide, technical specifications, and its data sheet).

    Attributes:
        capability: compute capability times ten.
        multiprocessors: how many it has.
        shared_kb: shared memory of a block at most; a multiprocessor has 1 KB more.
        l2_mb: L2 cache.
        warps, blocks: of a multiprocessor at most.
    """

    capability: int
    multiprocessors: int
    shared_kb: int
    l2_mb: int
    warps: int = 64
    blocks: int = 32

    def resident_blocks(self, threads: int, registers: int, shared: int) -> int:
        """Resident blocks of a multiprocessor, by NVIDIA's `cuda_occupancy.h`.

        Registers are allocated to warps in units, a quarter of them in each of four partitions.

        Args:
            threads: threads of a block.
            registers: registers of a thread.
            shared: bytes of shared memory of a block.
        """
        warps = -(-threads // WARP)
        registers_of_warp = _in_units(max(1, registers) * WARP, _REGISTER_UNIT)
        if registers_of_warp * _in_units(warps, _PARTITIONS) > REGISTERS or shared > self.shared_kb << 10:
            return 0
        by_registers = REGISTERS // _PARTITIONS // registers_of_warp * _PARTITIONS // warps
        by_shared = (self.shared_kb + 1 << 10) // _in_units(shared + _RESERVED_SHARED, _SHARED_UNIT)
        return min(self.blocks, self.warps // warps, by_registers, by_shared)


GPUS = {
    "a100": Gpu(80, 108, 163, 40),
    "a40": Gpu(86, 84, 99, 6, warps=48, blocks=16),
    "rtx4090": Gpu(89, 128, 99, 72, warps=48, blocks=24),
    "h100": Gpu(90, 132, 227, 50),
    "b200": Gpu(100, 148, 227, 126),
    "rtx5090": Gpu(120, 170, 99, 96, warps=48, blocks=24),
}
"""GPUs by name."""


def _in_units(size: int, unit: int) -> int:
    return -(-size // unit) * unit
