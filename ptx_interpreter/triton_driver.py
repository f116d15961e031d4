"""Triton's kernels, compiled to PTX for a GPU that isn't there and run on CPU tensors.

    with Driver(90):
        kernel[grid](tensor, ...)  # a kernel's faults are an error of the launch

Only kernels that this process hasn't launched before on another driver are compiled for this one.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Self

import numpy as np
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ptx_interpreter import GlobalMemory, Kernel, Module, Report, Unsupported, launch
from ptx_interpreter.gpus import GPUS, REGISTERS, Gpu
from ptx_interpreter.types import WARP

THREADS = 1024
FORMATS = {"fp32": "f4", "fp64": "f8", "i1": "i1", "u1": "u1"}
"""numpy's names of the types of scalar arguments; integers are those of their bits."""
DESCRIPTOR = re.compile(r"tensordesc<([^[>]*)\[")


def without_assembling(*stages: Any) -> tuple[str, str] | None:
    """A hook of Triton's compiler that passes the PTX on as machine code."""
    if not stages:
        return "PTX", "PTX"  # the key of Triton's cache
    stages[1]["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


class Driver:
    """Replaces Triton's driver within a `with` statement. A launch that has a fault raises an error.

    Where host/allocations.cpp was preloaded, kernels may touch what this process has allocated and no more.

    Args:
        capability: compute capability times ten that Triton compiles for.
        multiprocessors: how many the GPU has; None: as `gpu`.
        gpu: the GPU whose sizes kernels and programs see; None: the one of GPUS with this capability.
        options: of `launch`.

    Attributes:
        launches: how many there were.
        reports: of all launches, if it is set to a list.
    """

    def __init__(
        self, capability: int, multiprocessors: int | None = None, gpu: Gpu | None = None, **options: bool
    ) -> None:
        self.target = GPUTarget("cuda", capability, WARP)
        self.gpu = gpu or next(candidate for candidate in GPUS.values() if candidate.capability == capability)
        self.multiprocessors = multiprocessors or self.gpu.multiprocessors
        self.utils = self
        self.launches = 0
        self.reports: list[Report] | None = None
        self._options = options
        self._memory = GlobalMemory()
        self._memory.anywhere = not self._memory.follow_allocations()

    def __enter__(self) -> Self:
        self._before = knobs.runtime.add_stages_inspection_hook, driver._active
        knobs.runtime.add_stages_inspection_hook = without_assembling
        driver.set_active(self)
        return self

    def __exit__(self, *_: object) -> None:
        # Not by reset_active, which asks for a GPU.
        knobs.runtime.add_stages_inspection_hook, driver._active = self._before

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.gpu.shared_kb << 10,
            "max_num_regs": REGISTERS,
            "multiprocessor_count": self.multiprocessors,
            "warpSize": WARP,
        }

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        import torch

        return torch.cuda

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[Kernel, Kernel, int, int, int]:
        kernel = Module(ptx.decode()).kernels[name]
        return kernel, kernel, 0, 0, THREADS

    def unload_module(self, module: Kernel) -> None:
        """Nothing holds it but Triton."""

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        signature = list(source.signature.items())
        if metadata.global_scratch_size or getattr(metadata, "tensordesc_meta", None):
            raise Unsupported(f"{metadata.name}: tensor descriptors in memory (TMA); --sm 80 compiles them to pointers")

        def run(x: int, y: int, z: int, stream: int, kernel: Kernel, *launch_arguments: Any) -> None:
            # Metadata and the hooks of whoever watches come first.
            arguments = list(flat(signature, launch_arguments[4:]))
            # Kernels have two more, of scratch memory that none of them uses.
            params = bytearray(kernel.param_bytes)
            values = [part for _, kind, value in arguments for part in packed(kind, value)]
            for param, value in zip(kernel.params, values, strict=False):
                params[param.offset : param.offset + len(value)] = value
            self.prepare_memory(self._memory, {name: getattr(v, "base", v) for name, _, v in arguments})
            if x * y * z:
                self._launch(kernel, (x, y, z), WARP * metadata.num_warps, bytes(params), metadata.shared)

        return run

    def prepare_memory(self, memory: GlobalMemory, arguments: dict[str, Any]) -> None:
        """Called before each launch with its arguments by name."""

    def _launch(self, kernel: Kernel, grid: tuple[int, int, int], threads: int, params: bytes, shared: int) -> None:
        report = launch(kernel, grid, (threads,), params, self._memory, shared, check=False, **self._options)
        self.launches += 1
        if self.reports is not None:
            self.reports.append(report)
        self.handle(report)

    def handle(self, report: Report) -> None:
        """Called after each launch."""
        if report.faults:
            raise RuntimeError("\n".join(map(str, report.faults)))


def flat(signature: Iterable[tuple[str, Any]], values: Iterable[Any]) -> Iterator[tuple[str, str, Any]]:
    """Name, type and value of each argument that isn't constant; Triton takes tuples too, and tuples in them."""
    for (name, kind), value in zip(signature, values, strict=True):
        if isinstance(kind, tuple):
            yield from flat([(f"{name}[{n}]", each) for n, each in enumerate(kind)], value)
        elif kind != "constexpr":
            yield name, kind, value


def packed(kind: str, value: Any) -> list[bytes]:
    """An argument of Triton's type `kind`, as its kernel takes it: one parameter, or those of a tensor descriptor."""
    if match := DESCRIPTOR.match(kind):
        sizes, strides = list(value.shape), list(value.strides)
        flags = [value.padding == "nan", *([value.round_f32_to_tf32] if hasattr(value, "round_f32_to_tf32") else [])]
        kinds = ["*" + match[1], *["i64"] * 2 * len(sizes), *["i1"] * len(flags), *["i32"] * len(sizes)]
        kinds += ["i64"] * len(sizes)
        values = [value.base, *sizes, *strides, *flags, *sizes, *strides]
        return [part for each in zip(kinds, values, strict=True) for part in packed(*each)]
    if kind.startswith("*"):
        return [np.int64(value if isinstance(value, int) else value.data_ptr()).tobytes()]
    if kind in FORMATS:
        return [np.array(value, FORMATS[kind]).tobytes()]
    return [np.array(value, f"{kind[0]}{int(kind[1:]) // 8}").tobytes()]
