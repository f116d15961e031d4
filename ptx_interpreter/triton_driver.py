"""Triton's kernels, compiled to PTX for a GPU that isn't there and run on CPU tensors.

    with Driver(90):
        kernel[grid](tensor, ...)  # a kernel's faults are an error of the launch

Only kernels that this process hasn't launched before on another driver are compiled for this one.
"""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ptx_interpreter import GlobalMemory, Kernel, Module, Report, launch

SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""What a block may have, by compute capability times ten (CUDA C++ Programming Guide, technical specifications)."""
THREADS = 1024
WARP = 32
FORMATS = {"fp32": "f4", "fp64": "f8", "i1": "i1", "u1": "u1"}
"""Of scalar arguments, as numpy calls them; integers are those of their bits."""


def without_assembling(*stages: Any) -> tuple[str, str] | None:
    """A hook of Triton's compiler: what it takes for machine code is the PTX."""
    if not stages:
        return "PTX", "PTX"  # the key under which Triton keeps what it compiles
    stages[1]["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


class Driver:
    """In the place of Triton's own within a `with` statement. A launch that has a fault raises an error.

    Where host/allocations.cpp was preloaded, kernels may touch what this process has allocated and no more.

    Args:
        capability: the GPU's, times ten.
        options: of `launch`.

    Attributes:
        launches: how many there were.
        reports: of all launches, if it is set to a list.
    """

    def __init__(self, capability: int, **options: bool) -> None:
        self.target = GPUTarget("cuda", capability, WARP)
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
        return {"max_shared_mem": SHARED_KB[self.target.arch] * 1024}

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[Kernel, Kernel, int, int, int]:
        kernel = Module(ptx.decode()).kernels[name]
        return kernel, kernel, 0, 0, THREADS

    def unload_module(self, module: Kernel) -> None:
        """Nothing holds it but Triton."""

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        kinds = flat(source.signature.values())

        def run(x: int, y: int, z: int, stream: int, kernel: Kernel, *given: Any) -> None:
            arguments = flat(given[4:])  # behind metadata, and the hooks of whoever watches
            values = [packed(kind, a) for kind, a in zip(kinds, arguments, strict=True) if kind != "constexpr"]
            # Kernels have two more, of scratch memory that none of ours uses.
            params = bytearray(kernel.param_bytes)
            for param, value in zip(kernel.params, values, strict=False):
                params[param.offset : param.offset + len(value)] = value
            self._launch(kernel, (x, y, z), WARP * metadata.num_warps, bytes(params), metadata.shared)

        return run

    def _launch(self, kernel: Kernel, grid: tuple[int, int, int], threads: int, params: bytes, shared: int) -> None:
        report = launch(kernel, grid, (threads,), params, self._memory, shared, check=False, **self._options)
        self.launches += 1
        if self.reports is not None:
            self.reports.append(report)
        if report.faults:
            raise RuntimeError("\n".join(map(str, report.faults)))


def flat(values: Iterable[Any]) -> list[Any]:
    """Triton takes tuples as arguments, and tuples in them; of constants, those too that a kernel takes whole."""
    return [one for value in values for one in (flat(value) if type(value) is tuple else [value])]


def packed(kind: str, value: Any) -> bytes:
    """An argument of Triton's type `kind`, as its kernel takes it."""
    if kind.startswith("*"):
        return np.int64(value if isinstance(value, int) else value.data_ptr()).tobytes()
    if kind in FORMATS:
        return np.array(value, FORMATS[kind]).tobytes()
    return np.array(value, f"{kind[0]}{int(kind[1:]) // 8}").tobytes()
