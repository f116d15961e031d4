"""The tests of every op: a file that imports them brings CASES, each of a pair of functions (ours and the same from
PyTorch's own) and of their inputs in float64.

`QUICK` names by a test the cases that aren't exhaustive; without an entry all are quick. `TRANSFORMED` names the cases
for opcheck and for the tests of torch.func. `THREADED` has functions and inputs that occupy several threads.
"""

import op_checks
import pytest
import torch
from op_checks import DTYPES, OPCHECK_DTYPES, cast, exhaustive_but, with_gradients
from torch.utils._pytree import tree_map_only

__all__ = [
    "pytest_generate_tests",
    "test_as_accurate_as_torch",
    "test_compiles_without_graph_break",
    "test_gradcheck",
    "test_opcheck",
    "test_strided_inputs_change_nothing",
    "test_threads_change_no_bit",
    "test_two_runs_are_bit_equal",
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function.__module__ == __name__:
        quick = getattr(metafunc.module, "QUICK", {}).get(metafunc.function.__name__)
        cases = metafunc.module.CASES
        if metafunc.function is test_threads_change_no_bit:
            metafunc.parametrize(("function", "inputs"), metafunc.module.THREADED)
            return
        if metafunc.function is test_opcheck:
            cases = [case for case in cases if case.id in metafunc.module.TRANSFORMED]
        metafunc.parametrize(("pair", "inputs"), exhaustive_but(cases, *quick) if quick else cases)


def spread(x):
    """The same values with gaps between them, and with the first dimension fastest."""
    if x is None:
        return None
    backwards = tuple(reversed(range(x.dim())))
    return torch.stack((x.permute(backwards),) * 2, -1)[..., 0].permute(backwards)


@pytest.mark.parametrize("dtype", OPCHECK_DTYPES)
def test_opcheck(pair, inputs, dtype):
    """Each op of both passes and of a call without gradients, with each of its options."""
    given = [spread(x) for x in cast(inputs, dtype)]
    with op_checks.Recorder() as recorder:
        with_gradients(pair[0], given, preserve_strides=True)
        with torch.no_grad():
            pair[0](*given)
    calls = {
        (op, str([x for x in args if not isinstance(x, torch.Tensor)])): (op, args)
        for op, args in reversed(recorder.own_calls())
    }
    assert len(calls) >= 2
    for op, args in calls.values():
        is_backward = op.name().endswith("_backward")
        op_checks.assert_opcheck(op, tree_map_only(torch.Tensor, torch.Tensor.detach, args) if is_backward else args)


@pytest.mark.kernels("nvcc")
def test_strided_inputs_change_nothing(pair, inputs):
    dense = cast(inputs, torch.float32)
    actual = with_gradients(pair[0], [spread(x) for x in dense], preserve_strides=True)
    torch.testing.assert_close(actual, with_gradients(pair[0], dense), rtol=1e-5, atol=1e-5)


def test_gradcheck(pair, inputs):
    op_checks.assert_gradcheck(pair[0], inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.kernels
def test_as_accurate_as_torch(pair, inputs, dtype):
    op_checks.assert_as_accurate_as_torch(*pair, inputs, dtype)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_compiles_without_graph_break(pair, inputs, dynamic):
    op_checks.assert_compiles(pair[0], cast(inputs, torch.float32), dynamic)


@pytest.mark.kernels("nvcc")
def test_two_runs_are_bit_equal(pair, inputs):
    op_checks.assert_deterministic(pair[0], cast(inputs, torch.bfloat16))


def test_threads_change_no_bit(function, inputs):
    op_checks.assert_bit_equal(*op_checks.thread_results(lambda: with_gradients(function, inputs)))
