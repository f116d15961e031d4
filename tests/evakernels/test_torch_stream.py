"""How the compiled library finds torch's function for the current CUDA stream, with stub libraries."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from op_suite import ROOT

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

STUB = """
extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  *stream = reinterpret_cast<void*>(40 + device);
  return 0;
}
"""
# Loads libraries as Python does a module, each for itself, or globally; then asks for the stream of device 2.
PROGRAM = """
#include <cstdio>
#include <cstring>

#include "bind/torch_stream.h"

int main(int count, char** libraries) {
  for (int i = 2; i < count; ++i) {
    const int scope = std::strcmp(libraries[1], "global") == 0 ? RTLD_GLOBAL : RTLD_LOCAL;
    if (!dlopen(libraries[i], RTLD_NOW | scope)) return 3;
  }
  try {
    void* stream = nullptr;
    const int code = evakernels::find_stream_function()(2, &stream);
    std::printf("%d %ld", code, reinterpret_cast<long>(stream));
  } catch (const std::exception& error) {
    std::printf("%s", error.what());
  }
}
"""


def compile_cpp(text: str, out: Path, *options: object) -> Path:
    source = out.with_suffix(".cpp")
    source.write_text(text)
    subprocess.run(["g++", "-std=c++20", "-I", ROOT / "csrc", source, "-o", out, *options], check=True)
    return out


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_cpp(PROGRAM, tmp_path_factory.mktemp("program") / "program", "-ldl")


def library(folder: Path, text: str, name: str = "libtorch_cuda.so") -> Path:
    return compile_cpp(text, folder / name, "-shared", "-fPIC", f"-Wl,-soname,{name}")


def printed(program: Path, *arguments: object) -> str:
    call: Sequence[object] = [program, *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout  # type: ignore[arg-type]


@pytest.mark.parametrize(("scope", "name"), [("local", "libtorch_cuda.so"), ("global", "libother.so")])
def test_stream_function_in_loaded_library(program: Path, tmp_path: Path, scope: str, name: str) -> None:
    assert printed(program, scope, library(tmp_path, STUB, name)) == "0 42"


def test_stream_function_in_linked_library(tmp_path: Path) -> None:
    stub = library(tmp_path, STUB, "libother.so")
    program = compile_cpp(PROGRAM, tmp_path / "linked", "-Wl,--no-as-needed", stub, f"-Wl,-rpath,{tmp_path}", "-ldl")
    assert printed(program) == "0 42"


@pytest.mark.parametrize(("loaded", "end"), [(False, "which isn't loaded"), (True, "which is loaded but lacks it")])
def test_missing_stream_function(program: Path, tmp_path: Path, loaded: bool, end: str) -> None:
    libraries = [library(tmp_path, "int other = 0;")] if loaded else []
    text = printed(program, "local", *libraries)
    assert "aoti_torch_get_current_cuda_stream" in text
    assert text.endswith(f"libtorch_cuda.so, {end}")
