"""The Triton kernels, run on the CPU by Triton's interpreter: the ops' own accuracy tests, in a process of its own."""

from importlib.util import find_spec

import pytest
from op_suite import CHOICE, run_ops

from evakernels.triton import FAMILIES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_ops(family: str) -> None:
    before = "with evakernels.use_backend('triton')"
    run_ops(before, f"({CHOICE}) and not several_tiles", ops=[family], TRITON_INTERPRET="1")
