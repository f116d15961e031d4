"""The runtime between compiled programs and the interpreter."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ptx_interpreter.gpus import GPUS
from ptx_interpreter.memory import build_allocations
from ptx_interpreter.runtime import (
    COMPRESSED,
    FAT_BINARY,
    LAUNCH_FAILURE,
    MAGIC,
    PART,
    PTX,
    Launches,
    newest_for,
    ptx_in,
)

HOST = Path(__file__).parents[1] / "host"


def fat_binary(*parts: tuple[int, int, bytes], flags: int = 0) -> bytes:
    """A fat binary of parts (kind, compute capability times ten, content)."""
    data = b"".join(
        PART.pack(kind, 0, PART.size, len(content), 0, 0, capability, 0, flags) + content
        for kind, capability, content in parts
    )
    return FAT_BINARY.pack(MAGIC, 1, FAT_BINARY.size, len(data)) + data


def test_the_ptx_of_each_fat_binary_is_found() -> None:
    machine_code = (2, 90, b"\x7fELF")
    first = fat_binary((PTX, 80, b"// of 8.0\0\0\0"), machine_code, (PTX, 100, b"// of 10.0\0"))
    second = fat_binary((PTX, 80, b"// another\0"))
    output = ptx_in(b"an object" + first + b"more of it" + second + b"its end")
    assert output == [{80: "// of 8.0", 100: "// of 10.0"}, {80: "// another"}]


def test_compressed_ptx_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="--no-compress"):
        ptx_in(fat_binary((PTX, 80, b"\1\2"), flags=COMPRESSED))


@pytest.mark.parametrize(("capability", "text"), [(80, "a"), (90, "a"), (100, "b"), (120, "b")])
def test_a_gpu_gets_the_newest_ptx_that_it_can_run(capability: int, text: str) -> None:
    assert newest_for({80: "a", 100: "b"}, capability) == text


def test_a_gpu_that_is_too_old_is_told() -> None:
    with pytest.raises(ValueError, match=r"compute capability 7\.5, only for \[80\]"):
        newest_for({80: "a"}, 75)


@pytest.mark.parametrize(
    ("gpu", "threads", "registers", "shared", "blocks"),
    [
        ("h100", 128, 248, 78_000, 2),
        ("a100", 160, 230, 101_000, 1),
        ("a40", 128, 32, 0, 12),
        ("h100", 32, 16, 1 << 18, 0),
    ],
)
def test_resident_blocks_of_gpus(gpu: str, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert GPUS[gpu].resident_blocks(threads, registers, shared) == blocks


COPY = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry copy(.param .u64 from, .param .u64 to)
{
    .reg .b32 %r<2>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [from];
    ld.param.u64 %rd2, [to];
    mov.u32 %r1, %tid.x;
    cvt.u64.u32 %rd3, %r1;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    .reg .b16 %rs<2>;
    ld.global.u8 %rs1, [%rd4];
    st.global.u8 [%rd5], %rs1;
    ret;
}
"""
FOLLOWED = f"""
import ctypes
from ptx_interpreter import GlobalMemory, Module, launch
memory = GlobalMemory()
assert memory.follow_allocations()
library = ctypes.CDLL(None)
pointers = [ctypes.c_void_p() for _ in range(2)]
for pointer in pointers:
    library.posix_memalign(ctypes.byref(pointer), ctypes.c_size_t(64), ctypes.c_size_t(37))
copy = Module('''{COPY}''').kernels["copy"]
params = b"".join(pointer.value.to_bytes(8, "little") for pointer in pointers)
def faults(threads):
    return [fault.kind for fault in launch(copy, [1], [threads], params, memory, check=False).faults]
print(faults(37), faults(38), ctypes.string_at(pointers[1], 37) == (b"\\xfe\\x7f" * 19)[:37])
library.free(pointers[1])
print(faults(37))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_allocations_are_followed_to_the_byte(tmp_path: Path) -> None:
    library = build_allocations(tmp_path)
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(HOST.parents[1])}
    call = [sys.executable, "-c", FOLLOWED]
    result = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    both = "['out of bounds', 'out of bounds']"
    assert result.stdout.splitlines() == [f"[] {both} True", "['out of bounds']"], result.stderr


SHARED = """
__global__ void add_up(float* out) {
  __shared__ float some[10 * 1024];
  extern __shared__ float more[];
  some[threadIdx.x] = more[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = some[threadIdx.x] + more[threadIdx.x];
}
extern "C" int launch(float* out, unsigned dynamic) {
  void* arguments[] = {&out};
  if (dynamic > 48 << 10)
    cudaFuncSetAttribute(add_up, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic);
  return cudaLaunchKernel((const void*)add_up, dim3(1), dim3(32), arguments, dynamic, 0);
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_static_shared_memory_counts(tmp_path: Path) -> None:
    """40 KB are static; a kernel may have 48 KB, or 99 KB if the host raises the limit."""
    (tmp_path / "shared.cu").write_text(SHARED)
    library = tmp_path / "shared.so"
    options = ["-arch=compute_80", "-code=compute_80", "-std=c++20", "-Xcompiler=-fPIC", "-shared", "-cudart=none"]
    sources = [tmp_path / "shared.cu", HOST / "cudart.cpp"]
    subprocess.run(["nvcc", "--no-compress", *options, *sources, "-o", library], check=True)
    out = np.zeros(32, np.float32)
    address = ctypes.c_void_p(out.ctypes.data)
    with Launches(library, 80):
        codes = [ctypes.CDLL(str(library)).launch(address, kb << 10) for kb in (8, 9, 59, 60)]
    assert codes == [0, LAUNCH_FAILURE, 0, LAUNCH_FAILURE]
    assert out.tolist() == [2 * n for n in range(32)]
