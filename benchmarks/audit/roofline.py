"""The least time of a kernel on each part of a GPU: predicted from counts, not measured.

PTX is not machine code: it has instructions that ptxas folds into others (address arithmetic, for one) and lacks those
that ptxas adds. Moves, which ptxas mostly removes, cost nothing.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from benchmarks.audit.result import Count, Launch, Line
from evaclip.plan.gpus import get_gpu
from ptx_interpreter.body import Instruction
from ptx_interpreter.traffic import SECTOR
from ptx_interpreter.types import WARP

# Parts of a multiprocessor: matmuls; sums and products of floats; integers, comparisons and conversions; roots,
# quotients and exponentials; loads, stores and shuffles; branches and barriers; copies of registers and parameters.
TENSOR, FMA, ALU, SFU, MEMORY, CONTROL, MOVES = "tensor", "fma", "alu", "sfu", "memory", "control", "moves"
MMA_SYNC = "mma.sync"
"""Matmuls of a warp, on the same part as `TENSOR`, a warpgroup's."""
ISSUE, DRAM = "issue", "DRAM"
PARTS = (TENSOR, FMA, ALU, SFU, MEMORY, ISSUE, DRAM)

_OPCODES = {
    MOVES: {"mov", "cvta"},
    CONTROL: {"bra", "bar", "ret", "exit", "trap", "fence", "membar"},
    TENSOR: {"wgmma"},
    MMA_SYNC: {"mma"},
    MEMORY: {"ld", "st", "cp", "ldmatrix", "stmatrix", "shfl"},
    SFU: {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "div", "sin", "cos", "tanh"},
}
_FLOATS = {"f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64"}
_WIDE = {"b64", "u64", "s64"}
_SIZES = re.compile(r"m(\d+)n(\d+)k(\d+)")
_WAITS = {"commit_group", "wait_group", "wait_all", "fence"}


def pipe_of(i: Instruction) -> str:
    """The part of a multiprocessor that runs an instruction."""
    mods = set(i.mods)
    if "param" in mods or (i.op == "cvt" and not mods & _FLOATS):
        return MOVES
    if mods & _WAITS:
        return CONTROL
    found = next((pipe for pipe, opcodes in _OPCODES.items() if i.op in opcodes), None)
    return found or (FMA if i.op in ("add", "sub", "mul", "fma", "mad") and mods & _FLOATS else ALU)


def instructions_of(i: Instruction) -> int:
    """Instructions of a multiprocessor: two for integers of 64 bits, which no part has."""
    return 2 if set(i.mods) & _WIDE and pipe_of(i) == ALU else 1


def flops_of(i: Instruction) -> int:
    """Multiplications and additions of a warp's matmul; a quarter of a warpgroup's."""
    if pipe_of(i) not in (TENSOR, MMA_SYNC):
        return 0
    sizes = next(filter(None, map(_SIZES.fullmatch, i.mods)))
    return 2 * math.prod(map(int, sizes.groups())) // (4 if i.op == "wgmma" else 1)


# --- time -----------------------------------------------------------------------------------------------------------

GPUS = {"sm_80": "a100-80g", "sm_90": "h100-80g", "sm_100": "b200"}
_FMA_LANES = {"sm_80": 64, "sm_90": 128, "sm_100": 128}
"""Lanes of a multiprocessor. These and the widths of the other parts are assumptions, the same for all three; no
measurement has confirmed them, least of all 64 lanes for integers on 10.0."""
MMA_SYNC_CEILING = {"sm_80": 1.0, "sm_90": 0.62, "sm_100": 0.25}
"""Share of the peak of matmuls that mma.sync reaches: an assumption; wgmma and tcgen05 reach all of it."""
_LANES = {ALU: 64, SFU: 16, ISSUE: 128, "cycles": 32}
_SECTORS_A_CYCLE = 4


@dataclass(frozen=True)
class Rates:
    """Rates of a whole GPU, per second, with evenly loaded multiprocessors.

    Attributes:
        pipes: warp instructions, by part; `issue` takes those of all parts, `cycles` counts cycles of a multiprocessor.
        flops: multiplications and additions of matmuls in 16 bits.
        bytes: bytes of memory.
    """

    pipes: Mapping[str, float]
    flops: float
    bytes: float


@cache
def rates(arch: str) -> Rates:
    """Rates of the GPU of an architecture in `GPUS`; the clock follows from its published float32 rate."""
    gpu = get_gpu(GPUS[arch])
    cycles = gpu.single_tflops * 1e12 / 2 / _FMA_LANES[arch]
    pipes = {name: cycles * number / WARP for name, number in ({FMA: _FMA_LANES[arch]} | _LANES).items()}
    return Rates(pipes, gpu.half_tflops * 1e12, gpu.memory_gbps * 1e9)


def _times(arch: str, total: Line, lines: Sequence[Line], moved: int) -> dict[str, float]:
    rate, warps, shared = rates(arch), total.warps, total.shared
    ceiling = MMA_SYNC_CEILING[arch] if warps.get(MMA_SYNC) else 1.0
    issued = sum(number for pipe, number in warps.items() if pipe != MOVES)
    # A cycle of memory serves a part of a request to shared memory, 128 bytes of global memory, or a shuffle.
    cycles = shared.sectors + sum(max(line.memory.requests, line.memory.sectors / _SECTORS_A_CYCLE) for line in lines)
    cycles += max(0, warps[MEMORY] - total.memory.requests - shared.requests)
    return {
        **{pipe: warps[pipe] / rate.pipes[pipe] for pipe in (FMA, ALU, SFU)},
        TENSOR: total.flops / rate.flops / ceiling,
        MEMORY: cycles / rate.pipes["cycles"],
        ISSUE: issued / rate.pipes[ISSUE],
        DRAM: moved / rate.bytes,
    }


def times(arch: str, launch: Launch) -> dict[str, float]:
    """Seconds of each part of the GPU, with evenly loaded multiprocessors, no gaps and perfect caches."""
    return _times(arch, launch.total, launch.lines, launch.touched)


def times_of_line(arch: str, line: Line) -> dict[str, float]:
    """As `times`, of a line's instructions; DRAM moves every requested sector."""
    return _times(arch, line, [line], SECTOR * line.memory.sectors)


def limiter(arch: str, launch: Launch) -> str:
    """The slowest part."""
    found = times(arch, launch)
    return max(found, key=lambda part: found[part])


def share_of_floor(count: Count) -> float:
    """The time of the floor's bytes at DRAM's rate over the time of the kernels' slowest parts."""
    least = sum(max(times(count.arch, launch).values()) for launch in count.launches)
    return count.floor / rates(count.arch).bytes / least
