"""The compiled library under clang, with which setup.py builds where there is no GCC."""

import shutil
from pathlib import Path

import pytest
from op_suite import build_library, copy_with_library, run_ops

CLANG = shutil.which("clang++")

pytestmark = pytest.mark.exhaustive


@pytest.mark.slow
@pytest.mark.skipif(CLANG is None, reason="there is no clang++")
def test_ops_compile_without_a_warning_and_are_as_accurate(tmp_path: Path) -> None:
    build = tmp_path / "build"
    build_library(build, "_ops", CMAKE_CXX_COMPILER=CLANG, CMAKE_CXX_FLAGS="-Werror")
    tree = tmp_path / "tree"
    tree.mkdir()
    tests = copy_with_library(tree, build / "_ops.so")
    run_ops(folder=tests, PYTHONPATH=str(tree))
