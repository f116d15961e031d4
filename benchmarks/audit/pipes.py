"""The pipe of a multiprocessor that runs an instruction of the PTX.

PTX is not machine code: it has instructions that ptxas folds into others (address arithmetic, for one) and lacks those
that ptxas adds. ptxas removes most moves.
"""

import math
import re

from ptx_interpreter.body import Instruction

# Pipes of a multiprocessor: matmuls; sums and products of floats; integers, comparisons and conversions; roots,
# quotients and exponentials; loads, stores and shuffles; branches and barriers; copies of registers and parameters.
TENSOR, FMA, ALU, SFU, MEMORY, CONTROL, MOVES = "tensor", "fma", "alu", "sfu", "memory", "control", "moves"
MMA_SYNC = "mma.sync"
"""Matmuls of a warp, on the same pipe as `TENSOR`, a warpgroup's."""
PIPES = (TENSOR, MMA_SYNC, FMA, ALU, SFU, MEMORY, CONTROL)
"""All but `MOVES`, in the order of display."""

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
    """Return the pipe that runs an instruction."""
    mods = set(i.mods)
    if "param" in mods or (i.op == "cvt" and not mods & _FLOATS):
        return MOVES
    if mods & _WAITS:
        return CONTROL
    found = next((pipe for pipe, opcodes in _OPCODES.items() if i.op in opcodes), None)
    return found or (FMA if i.op in ("add", "sub", "mul", "fma", "mad") and mods & _FLOATS else ALU)


def instructions_of(i: Instruction) -> int:
    """Instructions of a multiprocessor: two for integers of 64 bits, which no pipe has."""
    return 2 if set(i.mods) & _WIDE and pipe_of(i) == ALU else 1


def flops_of(i: Instruction) -> int:
    """Multiplications and additions of a warp's matmul; a quarter of a warpgroup's."""
    if pipe_of(i) not in (TENSOR, MMA_SYNC):
        return 0
    sizes = next(filter(None, map(_SIZES.fullmatch, i.mods)))
    return 2 * math.prod(map(int, sizes.groups())) // (4 if i.op == "wgmma" else 1)
