"""The Triton kernels, run on the CPU by Triton's interpreter: the ops' own accuracy tests, in a process of its own."""

from importlib.util import find_spec

import pytest
from op_suite import CHOICE, ROOT, run_ops

from evakernels.triton import FAMILIES

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)"),
]

BEFORE = "with evakernels.use_backend('triton')"
FILES = {"layer_norm": ("layer_norm", "residual_norm")}
"""Test files of a family, where it has others than its own."""

# Rows that are longer than registers hold are refused where there is a norm, as is a scale that isn't positive. The
# interpreter is slow: no residual of (40, 30, 24), of float16 the first test only, and of attention's larger shapes
# only those of the towers and a causal one whose prefix is padded; shapes of models in bfloat16 alone, as odd ones have
# every mask and dtype.
SERVED = "not several_tiles and (plain or not (4100 or 8199 or 8200 or 16390)) and not (30 and 24) and not negative"
SMALL = "not size_of_a_tower and not several_chunks and (not around_a_tile or 67) and (dtype1 or not shapes_of)"
# The tiles are the reference's.
SMALL += " and not (many and tiles)"
CHOSEN = f"({CHOICE}) and {SERVED} and {SMALL} and (accurate or not dtype2)"


@pytest.mark.parametrize("family", FAMILIES)
def test_ops(family: str) -> None:
    run_ops(BEFORE, CHOSEN, ops=FILES.get(family, [family]), TRITON_INTERPRET="1")


def test_widths_of_models() -> None:
    run_ops(BEFORE, "(1408 or 2730) and not dtype2", ops=["norm_widths"], TRITON_INTERPRET="1")


def test_no_columns() -> None:
    run_ops(BEFORE, "no_columns", ops=["layer_norm", "swiglu"], TRITON_INTERPRET="1")


def test_traffic() -> None:
    """Not interpreted: it is counted in PTX."""
    run_ops(choice="test_", ops=["triton_traffic"], PYTHONPATH=str(ROOT), TRITON_PTX="1")
