"""To which part of a multiprocessor an instruction of PTX goes, and how fast these parts are.

PTX is not machine code: what ptxas folds into other instructions (address arithmetic, for one) counts here, and what it
adds does not. Moves, which it mostly removes, are apart and cost nothing.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from evaclip.plan.gpus import get_gpu
from ptx_interpreter.body import Instruction

TENSOR, FMA, ALU, SFU, MEMORY, CONTROL, MOVES = "tensor", "fma", "alu", "sfu", "memory", "control", "moves"
PIPES = (TENSOR, FMA, ALU, SFU, MEMORY, CONTROL, MOVES)
"""Products of matrices; sums and products of floats; all of integers, comparisons and conversions; roots, quotients and
exponentials; loads, stores and shuffles; branches and barriers; copies of registers and parameters."""

_SFU = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "div", "sin", "cos", "tanh"}
_MEMORY = {"ld", "st", "cp", "ldmatrix", "stmatrix", "shfl"}
_CONTROL = {"bra", "bar", "ret", "exit", "trap", "fence", "membar"}
_FLOATS = {"f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64"}
_WIDE = {"b64", "u64", "s64"}
_SIZES = re.compile(r"m(\d+)n(\d+)k(\d+)")
_WAITS = {"commit_group", "wait_group", "wait_all", "fence"}


def pipe_of(i: Instruction) -> str:
    """One of `PIPES`."""
    mods = set(i.mods)
    if i.op in ("mov", "cvta") or "param" in mods or (i.op == "cvt" and not mods & _FLOATS):
        return MOVES
    if i.op in _CONTROL or mods & _WAITS:
        return CONTROL
    if i.op in ("mma", "wgmma"):
        return TENSOR
    if i.op in _MEMORY:
        return MEMORY
    if i.op in _SFU:
        return SFU
    return FMA if i.op in ("add", "sub", "mul", "fma", "mad") and mods & _FLOATS else ALU


def instructions_of(i: Instruction) -> int:
    """How many a multiprocessor makes of it: two of integers with 64 bits, which have no pipe of that width."""
    return 2 if set(i.mods) & _WIDE and pipe_of(i) == ALU else 1


def flops_of(i: Instruction) -> int:
    """Of a warp's product of matrices, multiplications and additions; of four warps' a quarter."""
    if pipe_of(i) != TENSOR:
        return 0
    sizes = next(filter(None, map(_SIZES.fullmatch, i.mods)))
    return 2 * math.prod(map(int, sizes.groups())) // (4 if i.op == "wgmma" else 1)


@dataclass(frozen=True)
class Rates:
    """Of a whole GPU, in a second, if its multiprocessors are evenly loaded.

    Attributes:
        gpu: the name in `evaclip.plan.gpus.GPUS`.
        pipes: instructions of warps, by pipe; `issue` takes those of all pipes, `cycles` is for cycles of a
            multiprocessor, of which each serves a request's part to shared memory or 128 bytes of the first cache.
        flops: of products of matrices in 16 bits.
        bytes: of memory.
    """

    gpu: str
    pipes: Mapping[str, float]
    flops: float
    bytes: float


GPUS = {"sm_80": "a100-80g", "sm_90": "h100-80g", "sm_100": "b200"}
_FMA_LANES = {"sm_80": 64, "sm_90": 128, "sm_100": 128}
"""Of a multiprocessor. These and the widths of the other pipes are assumptions, the same for all three; no measurement
has confirmed them, least of all 64 lanes for integers on 10.0."""
_LANES = {ALU: 64, SFU: 16, MEMORY: 32, "issue": 128, "cycles": 32}
_WARP = 32


@cache
def rates(arch: str) -> Rates:
    """Of the GPU of an architecture in `GPUS`; the clock is that of its published rate in float32."""
    gpu = get_gpu(GPUS[arch])
    cycles = gpu.single_tflops * 1e12 / 2 / _FMA_LANES[arch]
    lanes = {FMA: _FMA_LANES[arch]} | _LANES
    pipes = {name: cycles * number / _WARP for name, number in lanes.items()}
    return Rates(GPUS[arch], pipes, gpu.half_tflops * 1e12, gpu.memory_gbps * 1e9)
