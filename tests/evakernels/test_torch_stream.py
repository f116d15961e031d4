"""How the compiled library finds torch's current CUDA stream, with libraries in the place of torch's."""

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


def test_it_is_found_where_python_has_loaded_torch_for_itself(program: Path, tmp_path: Path) -> None:
    assert printed(program, "local", library(tmp_path, STUB)) == "0 42"


def test_it_is_found_in_what_is_loaded_globally_under_any_name(program: Path, tmp_path: Path) -> None:
    assert printed(program, "global", library(tmp_path, STUB, "libother.so")) == "0 42"


def test_it_is_found_in_a_library_that_is_linked(tmp_path: Path) -> None:
    stub = library(tmp_path, STUB, "libother.so")
    program = compile_cpp(PROGRAM, tmp_path / "linked", "-Wl,--no-as-needed", stub, f"-Wl,-rpath,{tmp_path}", "-ldl")
    assert printed(program) == "0 42"


@pytest.mark.parametrize(("loaded", "end"), [(False, "which isn't loaded"), (True, "which is loaded but lacks it")])
def test_the_error_says_where_it_was_looked_for(program: Path, tmp_path: Path, loaded: bool, end: str) -> None:
    libraries = [library(tmp_path, "int other = 0;")] if loaded else []
    text = printed(program, "local", *libraries)
    assert "no aoti_torch_get_current_cuda_stream in the libraries that _ops.so was loaded with" in text
    assert text.endswith(f"libtorch_cuda.so, {end}")
