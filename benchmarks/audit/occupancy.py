"""How many warps of a kernel a multiprocessor holds at a time: CUDA's published formula, and the budget."""

from collections.abc import Mapping
from functools import cache

from benchmarks.audit.budget import budget

SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
"""Bytes of shared memory of a multiprocessor."""
WARPS = 64
_BLOCKS = 32
_REGISTERS = 65_536
_PARTITIONS = 4
_REGISTER_UNIT, _SHARED_UNIT = 256, 128
_SHARED_OF_THE_SYSTEM = 1024
"""Bytes that each block takes beside its own."""
_WARP_SIZE = 32


def resident_warps(arch: str, threads: int, registers: int, shared: int) -> int:
    """Warps of a multiprocessor, of `WARPS` at most, for blocks of so many threads.

    The formula is that of NVIDIA's `cuda_occupancy.h`: registers are given to warps in units, of which each of the four
    partitions has a quarter.

    Args:
        arch: one of `SHARED`.
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block.
    """
    warps = _in_units(threads, _WARP_SIZE) // _WARP_SIZE
    registers_of_warp = _in_units(max(1, registers) * _WARP_SIZE, _REGISTER_UNIT)
    if registers_of_warp * _in_units(warps, _PARTITIONS) > _REGISTERS:
        return 0
    by_registers = _REGISTERS // _PARTITIONS // registers_of_warp * _PARTITIONS // warps
    by_shared = SHARED[arch] // _in_units(shared + _SHARED_OF_THE_SYSTEM, _SHARED_UNIT)
    return warps * min(_BLOCKS, WARPS // warps, by_registers, by_shared)


def occupancy(kernel: str, threads: int, dynamic_bytes: int = 0, source: str | None = None) -> Mapping[str, float]:
    """The share of the warps that a multiprocessor could hold, by architecture; empty for a kernel without a budget.

    Args:
        kernel: as `Launch.kernel` has it.
        threads: of a block.
        dynamic_bytes: of shared memory that a block asks for at its launch.
        source: the file that a kernel of a header is compiled in, if several have it.
    """
    shares = {}
    for arch, kernels in _budget().items():
        found = [name for name in kernels if name.partition(": ")[2] == kernel]
        own = [name for name in found if name.partition(": ")[0] == source] or found
        if own and arch in SHARED:
            registers, shared = kernels[own[0]]
            shares[arch] = resident_warps(arch, threads, registers, shared + dynamic_bytes) / WARPS
    return shares


def source_of(kernel: str) -> str | None:
    """The file of a kernel that one file alone has."""
    kernels = next(iter(_budget().values()))
    sources = [name.partition(": ")[0] for name in kernels if name.partition(": ")[2] == kernel]
    return sources[0] if len(sources) == 1 else None


@cache
def _budget() -> Mapping[str, Mapping[str, tuple[int, int]]]:
    stored: Mapping[str, Mapping[str, tuple[int, int]]] = budget().read()[1]
    return stored


def _in_units(size: int, unit: int) -> int:
    return -(-size // unit) * unit
