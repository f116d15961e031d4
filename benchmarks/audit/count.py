"""Runs ops on the kernels' PTX and counts, in a process for one simulated GPU.

    python -m benchmarks.audit.count sm_80 LIBRARY '[["layer_norm", "eva02-b16@224 b1", "bfloat16", "forward"]]'

pickles the counts to stdout; `triton` instead of LIBRARY counts the Triton kernels. `build.count_all` starts it.
"""

import gc
import json
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

import evakernels
from benchmarks import accuracy
from benchmarks.audit import budget
from benchmarks.audit.cases import Case, operation
from benchmarks.audit.pipes import flops_of, instructions_of, pipe_of
from benchmarks.audit.result import REST, Count, Launch, Line, add_up
from benchmarks.measure import DTYPES
from benchmarks.operation import Draw
from benchmarks.shapes import parse_shape
from ptx_interpreter import Report
from ptx_interpreter.runtime import Launches
from ptx_interpreter.traffic import Requests, Sectors

TRITON = "triton"
Buffers = Mapping[str, Sequence[tuple[int, int]]]
"""Addresses, [start, end), of one or more tensors."""


@contextmanager
def served(arch: str, library: str) -> Iterator[list[Report]]:
    """Launches within the `with` block leave their reports in the list."""
    capability = int(arch.removeprefix("sm_"))
    reports: list[Report] = []
    if library != TRITON:
        launches = Launches(library, capability, watch=False)
        launches.reports = reports
        with launches, evakernels.use_backend("cpu"):
            yield reports
        return
    from evakernels import triton as kernels
    from evakernels import tuning
    from ptx_interpreter.triton_driver import Driver

    kernels.interpret()
    tuning.find_gpu = lambda tensor: ("", capability)
    driver = Driver(capability, watch=False)
    driver.reports = reports
    with driver, evakernels.use_backend("triton"):
        yield reports


def count(reports: list[Report], kernels: str, arch: str, case: Case) -> Count:
    """Count one call of an op; its kernels leave their reports in `reports`."""
    name, shape_name, dtype_name, direction = case
    op, shape, dtype = operation(name), parse_shape(shape_name), DTYPES[dtype_name]
    inputs = op.inputs(shape, Draw(dtype, torch.device("cpu"), torch.Generator().manual_seed(0)))
    tensors = {name: accuracy.tensors(value) for name, value in inputs.items() if value is not None}
    work = op.work(shape, dtype.itemsize)
    reports.clear()
    if direction == "forward":
        cost = work.forward
        for leaf in accuracy.gradient_leaves(op, inputs) if kernels == TRITON else ():
            leaf.requires_grad_()  # a loss then also saves for backward
        with torch.set_grad_enabled(kernels == TRITON):
            outputs = accuracy.tensors(op.ours(**inputs))
        tensors |= {f"out {i}": [output] for i, output in enumerate(outputs)}
    else:
        assert work.backward is not None
        cost = work.backward
        leaves = [leaf.requires_grad_() for leaf in accuracy.gradient_leaves(op, inputs)]
        outputs = accuracy.tensors(op.ours(**inputs))
        upstream = [torch.randn_like(output) for output in outputs]
        reports.clear()
        gradients = torch.autograd.grad(outputs, leaves, upstream)
        tensors |= {f"d out {i}": [gradient] for i, gradient in enumerate(upstream)}
        tensors |= {f"d {name}": [gradient] for name, gradient in zip(op.gradients, gradients, strict=True)}
    buffers = spans_of(tensors)
    sizes = {name: sum(end - start for start, end in spans) for name, spans in buffers.items()}
    names = budget().readable([report.kernel for report in reports])
    launches = [replace(launch_of(one, buffers), kernel=kernel) for one, kernel in zip(reports, names, strict=True)]
    return Count(kernels, arch, name, shape.name, dtype_name, direction, cost.bytes, sizes, tuple(launches))


def launch_of(report: Report, buffers: Buffers) -> Launch:
    """The counts of a report. A buffer may be several tensors; accesses outside of all are `REST`."""
    barriers = sum(
        report.warps[block.number]
        for block in report.entry.parsed.blocks
        for i in block.instructions
        if i.op == "bar" and "warp" not in i.mods
    )
    blocks = report.grid[0] * report.grid[1] * report.grid[2]
    warps = -(-report.block[0] * report.block[1] * report.block[2] // 32) * blocks
    return Launch(
        kernel=report.kernel,
        barriers=barriers / warps,
        lines=tuple(_count_lines(report)),
        loads=_traffic(report.loads, buffers),
        stores=_traffic(report.stores, buffers),
    )


def _count_lines(report: Report) -> list[Line]:
    body = report.entry.parsed
    lines: dict[str, Line] = {}
    for block in body.blocks:
        for i in block.instructions:
            place, times = body.where(i.line), report.warps[block.number]
            line = lines.setdefault(place, Line(place))
            line.warps[pipe_of(i)] += times * instructions_of(i)
            line.flops += times * flops_of(i)
    for (space, place, _), traffic in report.traffic.items():
        (lines[place].shared if space.startswith("shared") else lines[place].memory).add(traffic)
    return [line for line in lines.values() if any(line.warps.values())]


def _traffic(sectors: Sectors, buffers: Buffers) -> dict[str, Requests]:
    result = {name: add_up(sectors.within(*span) for span in spans) for name, spans in buffers.items()}
    rest = zip(sectors.within(0, 1 << 62), add_up(result.values()), strict=True)
    result[REST] = Requests(*(total - known for total, known in rest))
    return {name: asked for name, asked in result.items() if asked.sectors}


def spans_of(tensors: Mapping[str, Sequence[Tensor]]) -> Buffers:
    """Addresses of each tensor. Tensors of one storage are one buffer with all names; a repeated tensor, such as a
    parameter after a step, is left out."""
    names: dict[tuple[int, int], list[str]] = {}
    views: set[tuple[int, int]] = set()
    for name, of_name in tensors.items():
        for tensor in of_name:
            storage = tensor.untyped_storage()
            span = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
            view = tensor.data_ptr(), tensor.numel()
            if storage.nbytes() and view not in views:
                views.add(view)
                names.setdefault(span, []).append(name)
    buffers: dict[str, list[tuple[int, int]]] = {}
    for span, found in names.items():
        buffers.setdefault(", ".join(dict.fromkeys(found)), []).append(span)
    return buffers


def main() -> None:
    """Counts the cases of the command line."""
    gc.disable()  # parsed kernels are many objects, and none is garbage
    arch, library, cases = sys.argv[1:]
    kernels = TRITON if library == TRITON else "cuda"
    with served(arch, library) as reports:
        counts = [count(reports, kernels, arch, tuple(case)) for case in json.loads(cases)]
    # A backward pass without kernels has everything from forward.
    pickle.dump([one for one in counts if one.launches], sys.stdout.buffer)


if __name__ == "__main__":
    main()
