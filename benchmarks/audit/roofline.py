"""The least time that a kernel can take, by each part of a GPU: predicted from counted instructions, not measured."""

from collections.abc import Mapping

from benchmarks.audit.pipes import ALU, FMA, MEMORY, MOVES, SFU, TENSOR, Rates, rates
from benchmarks.audit.result import SECTOR, Count, Launch, Line, Shared

DRAM = "DRAM"
ISSUE = "issue"
PARTS = (TENSOR, FMA, ALU, SFU, MEMORY, ISSUE, DRAM)
_SECTORS_A_CYCLE = 4


def _by_pipe(rate: Rates, warps: Mapping[str, int], flops: int, shared: Shared, lines: list[Line]) -> dict[str, float]:
    """Seconds by part, but for DRAM."""
    issued = sum(number for pipe, number in warps.items() if pipe != MOVES)
    # A cycle of memory serves a part of a request to shared memory, 128 bytes of global memory, or a shuffle.
    accesses = sum(line.requests for line in lines) + shared.requests
    cycles = shared.cycles + sum(max(line.requests, line.sectors / _SECTORS_A_CYCLE) for line in lines)
    cycles += max(0, warps.get(MEMORY, 0) - accesses)
    seconds = {pipe: warps.get(pipe, 0) / rate.pipes[pipe] for pipe in (FMA, ALU, SFU)}
    return seconds | {
        TENSOR: flops / rate.flops,
        MEMORY: cycles / rate.pipes["cycles"],
        ISSUE: issued / rate.pipes[ISSUE],
    }


def times(arch: str, launch: Launch) -> dict[str, float]:
    """Seconds by part of the GPU, if nothing else held it up: all multiprocessors evenly loaded, each part without a
    gap, caches perfect."""
    rate = rates(arch)
    found = _by_pipe(rate, launch.warps, launch.flops, launch.shared, list(launch.lines))
    return found | {DRAM: launch.touched / rate.bytes}


def limiter(arch: str, launch: Launch) -> str:
    """The part that takes longest."""
    found = times(arch, launch)
    return max(found, key=lambda part: found[part])


def share_of_floor(count: Count) -> float:
    """The time in which memory moves the floor's bytes over that of the kernels, each as long as its limiter takes."""
    least = sum(max(times(count.arch, launch).values()) for launch in count.launches)
    return count.floor / rates(count.arch).bytes / least


def times_of_line(arch: str, line: Line) -> dict[str, float]:
    """As `times`, of a line's instructions; for DRAM those of all sectors that it asks for."""
    rate = rates(arch)
    found = _by_pipe(rate, line.warps, line.flops, line.shared, [line])
    return found | {DRAM: SECTOR * line.sectors / rate.bytes}
