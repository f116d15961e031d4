"""The ops' own tests on other builds and backends: clang, sanitizers, every instruction set, the references."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from op_suite import ROOT, build_library, copy_with_library, gcc, run_ops, sanitizer_runtimes

import evakernels

pytestmark = [pytest.mark.exhaustive, pytest.mark.slow]
weekly = pytest.mark.weekly

CLANG = shutil.which("clang++")
SANITIZE = "-Og -fsanitize=address,undefined -fno-sanitize-recover=all"
NATIVE = evakernels.info()["native"]
ISAS = NATIVE.get("isas_available", [])
# What this machine can't run is compiled for the linker alone.
OTHERS = {f"EVAKERNELS_FLAGS_{isa}": "-O0;-fno-sanitize=all" for isa in NATIVE.get("isas_built", []) if isa not in ISAS}


@pytest.fixture(scope="module")
def compiler() -> str:
    found = gcc()
    if found is None:
        pytest.skip("no g++ whose sanitizers can be loaded before Python")
    return found


@pytest.fixture(scope="module")
def tests(compiler: str, made_once: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the ops' tests, with a library that is watched."""

    def make(build: Path) -> None:
        build_library(
            build,
            "_ops",
            CMAKE_BUILD_TYPE="Debug",
            CMAKE_CXX_COMPILER=compiler,
            CMAKE_CXX_FLAGS=SANITIZE,
            # In place of Debug's own, which are more than a message of the sanitizer tells.
            CMAKE_CXX_FLAGS_DEBUG="-g1",
            EVAKERNELS_CUDA="OFF",
            **OTHERS,
        )

    build = made_once("watched", make)
    return copy_with_library(tmp_path_factory.mktemp("watched"), build / "_ops.so")


@pytest.mark.skipif(not ISAS, reason="there are no compiled kernels")
# test_instruction_set runs the tests on the others.
@pytest.mark.parametrize("isa", [isa if isa == NATIVE["isa"] else pytest.param(isa, marks=weekly) for isa in ISAS])
def test_ops_under_sanitizers(isa: str, tests: Path, compiler: str) -> None:
    run_ops(
        folder=tests,
        EVAKERNELS_ISA=isa,
        PYTHONPATH=str(tests.parent),
        LD_PRELOAD=" ".join(sanitizer_runtimes(compiler)),
        # Python and torch free nothing at their end. The stack frames of the other check hold vectors of 64 bytes at
        # half their alignment under GCC 12.
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
    )


@pytest.mark.skipif(CLANG is None, reason="there is no clang++")
def test_clang_build_is_accurate(tmp_path: Path) -> None:
    build = tmp_path / "build"
    build_library(build, "_ops", CMAKE_CXX_COMPILER=CLANG, CMAKE_CXX_FLAGS="-Werror")
    tree = tmp_path / "tree"
    tree.mkdir()
    tests = copy_with_library(tree, build / "_ops.so")
    run_ops(folder=tests, PYTHONPATH=str(tree))


@pytest.mark.skipif(not ISAS, reason="there are no compiled kernels")
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != NATIVE["isa"]])
def test_instruction_set(isa: str) -> None:
    run_ops(EVAKERNELS_ISA=isa)


@pytest.mark.skipif(not NATIVE["loaded"], reason="the other tests run on the references already")
def test_reference() -> None:
    run_ops(options=("--backend", "reference"))


def test_no_op_test_mixes_devices() -> None:
    """On the meta device every comparison fails, but no op reports tensors of two devices."""
    ops = {"contrastive", "gelu", "layer_norm", "packed_attention", "rope_attention", "swiglu"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "-p",
        "no:cacheprovider",
        "--device",
        "meta",
        "--tb",
        "line",
    ]
    command += ["--kernels", "cpu=bfloat16", *(f"test_{op}.py" for op in ops)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}  # room for the errors
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert set(re.findall(r"^FAILED test_(\w+)\.py.*meta tensor", done.stdout, re.M)) == ops
    mixed = r"^(?:E|/).*(?:on cpu|device cpu|cpu and meta|meta and cpu|cpu, meta).*"
    assert not re.findall(mixed, done.stdout, re.M)
