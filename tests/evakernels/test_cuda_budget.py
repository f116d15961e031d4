"""nvcc compiles every GPU kernel for each GPU within its budget of registers, and with vectorised memory accesses."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ptx_build import budget

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.slow,
    pytest.mark.xdist_group("nvcc"),
    pytest.mark.skipif(budget.nvcc() is None, reason="no nvcc"),
]

# So many elements at a time of the first type: `norm_add_forward<BFloat16, BFloat16, 8, 3>` has 8 of 2 bytes.
ELEMENTS = re.compile(r"<(?:\d+, )?(?:TokenTypes<)?(BFloat16|Float16|float)\b[^>]*?>?, (\d+)(?:, \d+)?>$")


def is_wide(kernel: str) -> bool:
    """Whether a kernel accesses its large buffers by 16 bytes a thread."""
    found = ELEMENTS.search(kernel)
    return found is not None and int(found[2]) * (4 if found[1] == "float" else 2) == 16


def check_accesses(found: dict[str, Any], same_compiler: bool, remedy: str) -> None:
    allowed = budget.read_accesses()
    wide = [kernel for kernel in found if is_wide(kernel)]
    assert len(wide) >= 60, wide
    for kernel in wide:
        accesses = found[kernel]
        assert accesses.wide_loads > 0, (kernel, accesses)
        assert accesses.wide_stores > 0, (kernel, accesses)
        if same_compiler:
            assert accesses.other_loads <= allowed[kernel].other_loads, (kernel, accesses, allowed[kernel], remedy)
            assert accesses.other_stores <= allowed[kernel].other_stores, (kernel, accesses, allowed[kernel], remedy)


@pytest.fixture(scope="module", autouse=True)
def _compiled(made_once: Callable[..., Path]) -> None:
    made_once("ptx", lambda folder: budget.build("ptx"))


# 8.0 and 9.0 run one PTX, 10.0 and 12.0 the other.
@pytest.mark.parametrize(
    "archs", [("sm_90", "sm_100"), pytest.param(("sm_80", "sm_120"), marks=pytest.mark.weekly)], ids="-".join
)
def test_kernels_are_within_budget(archs: tuple[str, ...]) -> None:
    release, allowed = budget.read()
    found = budget.measure(archs)
    same_compiler = release == budget.nvcc_release()
    remedy = "if that is meant to be so: python tests/cuda/budget.py"
    for arch, kernels in found.items():
        assert set(kernels) == set(allowed[arch]), remedy
        for kernel, usage in kernels.items():
            registers, shared = allowed[arch][kernel]
            assert usage.spilled == usage.stack == 0, (arch, kernel, usage)
            assert usage.shared <= shared, (arch, kernel, usage, remedy)
            if same_compiler:
                assert usage.registers <= registers, (arch, kernel, usage, remedy)
    if budget.DISASSEMBLED not in archs:
        return
    tool = budget.disassembler()
    if tool is None:
        pytest.skip("registers and shared memory are within the budget; no cuobjdump to look at memory accesses")
    check_accesses(budget.measure_accesses(tool), same_compiler, remedy)
