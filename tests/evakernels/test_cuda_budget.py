"""nvcc compiles every GPU kernel for each GPU, within the registers and the shared memory that are budgeted."""

import importlib.util
import shutil
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "csrc/cuda/budget.py"


@pytest.mark.slow
@pytest.mark.xdist_group("build")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_kernels_keep_to_their_budget() -> None:
    spec = importlib.util.spec_from_file_location("budget", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    budget = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(budget)
    (release, allowed), found = budget.read(), budget.measure()
    same_compiler = release == budget.nvcc_release()
    remedy = f"if that is meant to be so: python {SCRIPT.relative_to(SCRIPT.parents[2])}"
    assert {arch: set(kernels) for arch, kernels in found.items()} == {a: set(k) for a, k in allowed.items()}, remedy
    for arch, kernels in found.items():
        for kernel, usage in kernels.items():
            registers, shared = allowed[arch][kernel]
            assert usage.spilled == usage.stack == 0, (arch, kernel, usage)
            assert usage.shared <= shared, (arch, kernel, usage, remedy)
            if same_compiler:
                assert usage.registers <= registers, (arch, kernel, usage, remedy)
