"""Serves the launches of a library that nvcc's objects are linked into, with host/cudart.cpp as its CUDA runtime.

    with Launches(library, capability=80):
        ...  # what calls the library; a kernel's faults are an error of the launch

A library holds the PTX of its kernels, uncompressed with nvcc's option `--no-compress`.
"""

import ctypes
import math
import struct
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from ptx_interpreter import GlobalMemory, Kernel, Module, Report, launch
from ptx_interpreter.gpus import GPUS, REGISTERS

FAT_BINARY = struct.Struct("<IHHQ")
"""Magic number, version, bytes of this header, bytes of the parts that follow."""
PART = struct.Struct("<HHIQQIIQQ")
"""Kind, version, bytes of this header, bytes of what follows it, ..., compute capability times ten, ..., flags."""
MAGIC = 0xBA55ED50
PTX = 1
COMPRESSED = 0x2000 | 0x8000
LAUNCH_FAILURE = 719
"""A cudaError_t, of which the runtime asks for the message that was given."""

SERVE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,  # the fat binary
    ctypes.c_char_p,  # the kernel's name
    ctypes.POINTER(ctypes.c_uint * 3),  # blocks of the grid
    ctypes.POINTER(ctypes.c_uint * 3),  # threads of a block
    ctypes.POINTER(ctypes.c_void_p),  # arguments
    ctypes.c_size_t,  # bytes of dynamic shared memory
    ctypes.c_size_t,  # how many bytes of static and dynamic shared memory there may be
    ctypes.POINTER(ctypes.c_char),  # where the message of an error goes
    ctypes.c_size_t,  # and how long it may be
)
OCCUPANCY = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,  # the fat binary
    ctypes.c_char_p,  # the kernel's name
    ctypes.c_int,  # threads of a block
    ctypes.c_size_t,  # bytes of dynamic shared memory
)
MOST_REGISTERS = 255


def ptx_in(data: bytes) -> list[dict[int, str]]:
    """The PTX of each fat binary in `data`, an object file or a library, by compute capability times ten.

    Raises:
        ValueError: PTX is compressed.
    """
    result, magic = [], MAGIC.to_bytes(4, "little")
    at = data.find(magic)
    while at >= 0:
        _, _, header, size = FAT_BINARY.unpack_from(data, at)
        result.append(dict(_parts(data[at + header : at + header + size])))
        at = data.find(magic, at + header + size)
    return result


def _parts(data: bytes) -> Iterator[tuple[int, str]]:
    at = 0
    while at < len(data):
        kind, _, header, size, _, _, capability, _, flags = PART.unpack_from(data, at)
        if kind == PTX:
            if flags & COMPRESSED:
                raise ValueError("the PTX is compressed: give nvcc the option --no-compress")
            yield capability, data[at + header : at + header + size].partition(b"\0")[0].decode()
        at += header + size


def newest_for(texts: dict[int, str], capability: int) -> str:
    """The PTX that a driver compiles for a GPU of this compute capability times ten.

    Raises:
        ValueError: there is none.
    """
    fitting = [supported for supported in texts if supported <= capability]
    if not fitting:
        raise ValueError(f"there is no PTX for compute capability {capability / 10}, only for {sorted(texts)}")
    return texts[max(fitting)]


class Launches:
    """Serves a library's launches within a `with` statement. A launch that has a fault returns an error.

    Where host/allocations.cpp was preloaded, kernels may touch what this process has allocated and no more.

    Args:
        library: the path of what was linked with host/cudart.cpp.
        capability: the GPU's, times ten; the PTX is that for it, or for the newest one before it.
        edit: changes the PTX before it is read.
        gpu: a name in GPUS, whose number of multiprocessors, occupancy, shared memory and L2 cache the library sees; by
            default those of the small GPU of host/cudart.cpp. A process plays one.
        registers: maps a kernel's name to its registers per thread; by default as many as its launch bounds allow.
        options: of `launch`.

    Attributes:
        launches: how many there were.
        lines: how many instructions of threads each line of a source file took, by file and line.
        reports: of all launches, if it is set to a list.
    """

    def __init__(
        self,
        library: str | Path,
        capability: int,
        edit: Callable[[str], str] = str,
        gpu: str | None = None,
        registers: Callable[[str], int] | None = None,
        **options: bool,
    ) -> None:
        self.launches = 0
        self.lines: Counter[tuple[str, int]] = Counter()
        self.reports: list[Report] | None = None
        self._capability, self._edit, self._options = capability, edit, options
        self._memory = GlobalMemory()
        self._memory.anywhere = not self._memory.follow_allocations()
        self._modules: dict[int, Module] = {}
        self._library = ctypes.CDLL(str(library))
        self._gpu, self._registers = GPUS[gpu] if gpu else None, registers
        self._served, self._occupancy = SERVE(self._serve), OCCUPANCY(self._resident_blocks)  # C holds no reference

    def __enter__(self) -> Self:
        self._library.ptx_serve(self._served)
        if self._gpu:
            shared = ctypes.c_size_t(self._gpu.shared_kb << 10)
            self._library.ptx_play(self._gpu.multiprocessors, shared, self._gpu.l2_mb << 20, self._occupancy)
        return self

    def __exit__(self, *_: object) -> None:
        self._library.ptx_serve(None)

    def _serve(
        self, binary: int, name: bytes, grid: Any, block: Any, arguments: Any, shared: int, limit: int, *message: Any
    ) -> int:
        try:
            kernel = self._module(binary).kernels[name.decode()]
            sizes = tuple(grid.contents), tuple(block.contents)
            if (static := _static_shared(kernel)) + shared > limit:
                raise ValueError(
                    f"shared memory must have at most {limit} bytes, got {static} static + {shared} dynamic"
                )
            text = self._launch(kernel, sizes, packed(kernel, arguments), shared)
        except BaseException:  # which C can't be given
            text = traceback.format_exc()
        if not text:
            return 0
        buffer, size = message
        encoded = text.encode()[: size - 1] + b"\0"
        ctypes.memmove(buffer, encoded, len(encoded))
        return LAUNCH_FAILURE

    def _launch(self, kernel: Kernel, sizes: tuple[Any, Any], params: bytes, shared: int) -> str:
        grid, block = sizes
        report = launch(kernel, grid, block, params, self._memory, shared, check=False, **self._options)
        self.launches += 1
        self.lines.update(report.lines())
        if self.reports is not None:
            self.reports.append(report)
        return "\n".join(map(str, report.faults))

    def _resident_blocks(self, binary: int, name: bytes, threads: int, shared: int) -> int:
        assert self._gpu is not None
        kernel = self._module(binary).kernels[name.decode()]
        threads_at_most = math.prod(kernel.most_threads or [threads])
        allowed = min(MOST_REGISTERS, REGISTERS // threads_at_most // 8 * 8)
        registers = self._registers(kernel.name) if self._registers else allowed
        return self._gpu.resident_blocks(threads, registers, _static_shared(kernel) + shared)

    def _module(self, binary: int) -> Module:
        """The module of the fat binary at this address."""
        if binary not in self._modules:
            _, _, header, size = FAT_BINARY.unpack(ctypes.string_at(binary, FAT_BINARY.size))
            (texts,) = ptx_in(ctypes.string_at(binary, header + size))
            self._modules[binary] = Module(self._edit(newest_for(texts, self._capability)))
        return self._modules[binary]


def _static_shared(kernel: Kernel) -> int:
    return sum(variable.size for variable in kernel.parsed.shared)


def packed(kernel: Kernel, arguments: Any) -> bytes:
    """The kernel's parameters, of pointers to its arguments."""
    params = bytearray(kernel.param_bytes)
    for param, address in zip(kernel.params, arguments, strict=False):
        params[param.offset : param.offset + param.size] = ctypes.string_at(address, param.size)
    return bytes(params)
