"""Small kernels as PTX text, and launches of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptx_interpreter import GlobalMemory, Kernel, Module, Report, launch

REGISTERS = ".reg .pred %p<20>; .reg .b16 %h<40>; .reg .b32 %r<80>; .reg .f32 %f<80>; .reg .b64 %d<40>;"
HEADER = "\n.version 8.0\n.target sm_90a\n.address_size 64\n"
BLOCK = 64


def kernel(body: str, params: int = 1, *, head: str = "", registers: str = "") -> Kernel:
    """Makes a kernel of the instructions in `body`, with addresses as parameters p0, p1, ..., in %d30, %d31, ...

    `head` stands in front of the kernel, `registers` declares more than REGISTERS does.
    """
    declared = ", ".join(f".param .u64 p{n}" for n in range(params))
    loads = "\n".join(f"ld.param.u64 %d{30 + n}, [p{n}];" for n in range(params))
    text = f"""{HEADER}{head}
.visible .entry test({declared})
{{
{REGISTERS}
{registers}
{loads}
{body}
ret;
}}
"""
    return Module(text).kernels["test"]


def run(
    program: Kernel,
    arrays: Sequence[np.ndarray],
    *,
    grid: int | tuple[int, ...] = 1,
    block: int | tuple[int, ...] = 32,
    shared: int = 0,
    check: bool = True,
) -> Report:
    """Launches it with the addresses of these arrays, which it may touch and nothing else."""
    memory = GlobalMemory()
    params = b"".join(memory.add(array, f"p{n}").to_bytes(8, "little") for n, array in enumerate(arrays))
    sizes = (size if isinstance(size, tuple) else (size,) for size in (grid, block))
    return launch(program, *sizes, params, memory, shared, check=check)


def faults(program: Kernel, arrays: Sequence[np.ndarray], **options: Any) -> list[str]:
    """The kinds of the faults of a launch."""
    return [fault.kind for fault in run(program, arrays, check=False, **options).faults]


def apply(instructions: str, *inputs: np.ndarray, out: Any, registers: str = "") -> np.ndarray:
    """Runs instructions in a thread for each element: %a0, %a1, ... are the inputs' elements, %o becomes the result.

    The elements are padded to whole blocks of 64 threads. Some threads run it twice, with others idle.
    """
    count = len(inputs[0])
    padded = -(-count // BLOCK) * BLOCK
    arrays = [np.concatenate([each, np.resize(each, padded - count)]) for each in inputs]
    arrays.append(np.zeros(padded, out))
    sizes = [array.itemsize for array in arrays]
    names = [f"%a{n}" for n in range(len(inputs))] + ["%o"]
    declared = " ".join(f".reg .b{8 * max(size, 2)} {name};" for name, size in zip(names, sizes, strict=True))
    lines = ["mov.u32 %r70, %ctaid.x;", "mov.u32 %r71, %tid.x;", f"mad.lo.s32 %r72, %r70, {BLOCK}, %r71;"]
    for n, size in enumerate(sizes):
        lines.append(f"mul.wide.u32 %d{20 + n}, %r72, {size}; add.s64 %d{20 + n}, %d{20 + n}, %d{30 + n};")
    loads = [f"ld.global.b{8 * size} %a{n}, [%d{20 + n}];" for n, size in enumerate(sizes[:-1])]
    store = f"st.global.b{8 * sizes[-1]} [%d{20 + len(inputs)}], %o;"
    # All threads first; then those with odd numbers again. The others now have other inputs, and keep their results.
    lines += [*loads, instructions, store, "and.b32 %r73, %r71, 1; setp.eq.s32 %p19, %r73, 0;"]
    lines += [f"not.b{8 * max(size, 2)} %a{n}, %a{n};" for n, size in enumerate(sizes[:-1])]
    lines += ["@%p19 bra DONE;", *loads, instructions, store, "DONE:", store]
    program = kernel("\n".join(lines), len(arrays), registers=declared + registers)
    run(program, arrays, grid=padded // BLOCK, block=BLOCK)
    return arrays[-1][:count]
