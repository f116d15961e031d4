"""Serves the launches of a library that nvcc's objects are linked into, with host/cudart.cpp as its CUDA runtime.

    with Launches(library, capability=80):
        ...  # what calls the library; a kernel's faults are an error of the launch

A library holds the PTX of its kernels, uncompressed if nvcc was told `--no-compress`.
"""

import ctypes
import struct
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ptx_interpreter import GlobalMemory, Module, launch

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
    ctypes.POINTER(ctypes.c_char),  # where the message of an error goes
    ctypes.c_size_t,  # and how long it may be
)


def ptx_in(data: bytes) -> list[dict[int, str]]:
    """The PTX of each fat binary in `data`, an object file or a library, by compute capability times ten.

    Raises:
        ValueError: PTX is compressed.
    """
    found, magic = [], MAGIC.to_bytes(4, "little")
    at = data.find(magic)
    while at >= 0:
        _, _, header, size = FAT_BINARY.unpack_from(data, at)
        found.append(dict(_parts(data[at + header : at + header + size])))
        at = data.find(magic, at + header + size)
    return found


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
    fitting = [own for own in texts if own <= capability]
    if not fitting:
        raise ValueError(f"there is no PTX for compute capability {capability / 10}, only for {sorted(texts)}")
    return texts[max(fitting)]


class Launches:
    """Serves a library's launches within a `with` statement.

    `edit` changes PTX before it is read. `options` are those of `launch`.
    """

    def __init__(
        self, library: str | Path, capability: int, edit: Callable[[str], str] = str, **options: bool
    ) -> None:
        self.capability, self.edit, self.options = capability, edit, options
        self.memory = GlobalMemory()
        self.lines: Counter[tuple[str, int]] = Counter()
        """How many instructions of threads each line of a source file took."""
        self.launches = 0
        self.faults: list[str] = []
        """Of all launches, also of those that a caller expected to fail."""
        self.memory.anywhere = not self.memory.follow_allocations()
        self._modules: dict[int, Module] = {}
        self._library = ctypes.CDLL(str(library))
        self._served = SERVE(self._serve)  # C holds no reference

    def __enter__(self) -> Self:
        self._library.ptx_serve(self._served)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._library.ptx_serve(None)

    def _serve(self, binary: int, name: bytes, grid: Any, block: Any, arguments: Any, *rest: Any) -> int:
        shared_bytes, message, size = rest
        try:
            text = self._launch(binary, name.decode(), (tuple(grid.contents), tuple(block.contents)), arguments, shared_bytes)
        except BaseException:  # which C can't be given
            text = traceback.format_exc()
        if not text:
            return 0
        self.faults.append(text)
        ctypes.memmove(message, text.encode()[: size - 1] + b"\0", min(len(text.encode()), size - 1) + 1)
        return LAUNCH_FAILURE

    def _launch(self, binary: int, name: str, sizes: Any, arguments: Any, shared_bytes: int) -> str:
        kernel = self._module(binary).kernels[name]
        params = bytearray(kernel.param_bytes)
        for number, param in enumerate(kernel.params):
            params[param.offset : param.offset + param.size] = ctypes.string_at(arguments[number], param.size)
        report = launch(kernel, *sizes, bytes(params), self.memory, shared_bytes, check=False, **self.options)
        self.launches += 1
        self.lines.update(report.lines())
        return "\n".join(map(str, report.faults))

    def _module(self, binary: int) -> Module:
        if binary not in self._modules:
            _, _, header, size = FAT_BINARY.unpack(ctypes.string_at(binary, FAT_BINARY.size))
            (texts,) = ptx_in(ctypes.string_at(binary, header + size))
            self._modules[binary] = Module(self.edit(newest_for(texts, self.capability)))
        return self._modules[binary]
