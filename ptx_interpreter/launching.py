"""Launches kernels."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from .machine import Machine
from .memory import GlobalMemory
from .parse import Kernel
from .registers import Dim3
from .report import Faults, Report
from .rounding import errors_of_numpy
from .types import WARP

LANES = 8192
"""That run together, at most, unless a single block has more."""
MACHINES_BYTES = 1 << 29

_machines: OrderedDict[tuple[Any, ...], Machine] = OrderedDict()
"""Of the last launches: to make one ready takes longer than a small launch."""


def launch(
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    params: bytes,
    memory: GlobalMemory,
    dynamic_shared: int = 0,
    *,
    watch: bool = True,
    count: bool = True,
    check: bool = True,
    hasty: bool = False,
) -> Report:
    """Runs a kernel for the whole grid.

    Args:
        grid, block: one to three sizes each.
        params: the packed arguments, `kernel.param_bytes` of them; `kernel.params` says where each one is.
        memory: what the kernel may touch of this process.
        dynamic_shared: bytes of shared memory of a block, in addition to the declared ones.
        watch: look for races and for reads of what nobody has written.
        count: count sectors and cycles.
        check: raise Faults at the end if there are any; else they are in the report only.
        hasty: raise Faults at the first one, and take a loop to have no end sooner.

    Raises:
        ValueError: the launch doesn't fit the kernel.
        Unsupported: the kernel has an instruction that the interpreter doesn't know.
    """
    sizes = (_dim3(grid, "grid"), _dim3(block, "block"))
    if len(params) != kernel.param_bytes:
        raise ValueError(f"{kernel.name} takes {kernel.param_bytes} bytes of parameters, not {len(params)}")
    if kernel.most_threads and math.prod(sizes[1]) > math.prod(kernel.most_threads):
        raise ValueError(f"{kernel.name} allows blocks of {kernel.most_threads} threads, not {sizes[1]}")
    report = Report(kernel.name, kernel, *sizes, dynamic_shared)
    blocks = math.prod(sizes[0])
    memory.begin_launch(blocks)
    fitting = max(1, LANES // (-(-math.prod(sizes[1]) // WARP) * WARP))
    together = -(-blocks // -(-blocks // fitting))  # rounds of the same size
    with errors_of_numpy():
        for first in range(0, blocks, together):
            options = (dynamic_shared, watch, count, hasty)
            _machine(kernel, sizes, min(together, blocks - first), memory, options).run(params, first, report)
    if check and report.faults:
        raise Faults(report.faults)
    return report


def _dim3(sizes: Sequence[int], what: str) -> Dim3:
    x, y, z = (*sizes, 1, 1)[:3] if 1 <= len(sizes) <= 2 else sizes
    if min(x, y, z) < 1:
        raise ValueError(f"a {what} of {tuple(sizes)}")
    return x, y, z


def _machine(
    kernel: Kernel, sizes: tuple[Dim3, Dim3], blocks: int, memory: GlobalMemory, options: tuple[int, bool, bool, bool]
) -> Machine:
    # The machine holds the kernel and the memory, so that no others come to have their numbers.
    key = (id(kernel), id(memory), sizes, blocks, options)
    machine = _machines.pop(key, None)
    if machine is None:
        machine = Machine(kernel, *sizes, blocks, memory)
        machine.prepare(options[0], watch=options[1], count=options[2])
        machine.hasty = options[3]
    _machines[key] = machine
    while len(_machines) > 1 and sum(kept.size for kept in _machines.values()) > MACHINES_BYTES:
        _, oldest = _machines.popitem(last=False)
        vars(oldest).clear()  # its parts hold each other
    return machine
