"""The tests of every op: a file that imports them brings CASES, each of a pair of functions (ours and the same from
PyTorch's own) and of their inputs in float64.

`QUICK` names by a test the cases that aren't exhaustive; without an entry all are quick.
"""

import op_checks
import pytest
import torch
from op_checks import DTYPES, exhaustive_but

__all__ = [
    "pytest_generate_tests",
    "test_as_accurate_as_torch",
    "test_compiles_without_graph_break",
    "test_gradcheck",
    "test_two_runs_are_bit_equal",
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function.__module__ == __name__:
        quick = getattr(metafunc.module, "QUICK", {}).get(metafunc.function.__name__)
        cases = metafunc.module.CASES
        metafunc.parametrize(("pair", "inputs"), exhaustive_but(cases, *quick) if quick else cases)


def cast(inputs, dtype):
    return [None if t is None else t.to(dtype) for t in inputs]


def test_gradcheck(pair, inputs):
    op_checks.assert_gradcheck(pair[0], inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_accurate_as_torch(pair, inputs, dtype):
    op_checks.assert_as_accurate_as_torch(*pair, inputs, dtype)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_compiles_without_graph_break(pair, inputs, dynamic):
    op_checks.assert_compiles(pair[0], cast(inputs, torch.float32), dynamic)


def test_two_runs_are_bit_equal(pair, inputs):
    op_checks.assert_deterministic(pair[0], cast(inputs, torch.bfloat16))
