"""Wrong arguments of each public op: an error of the right type that names the op and the argument.

Errors that all arguments of a kind have are made of right calls, CALLS in an op's test file; WRONG has the op's own:
the type, the name of the argument, and what is changed in the right call.
"""

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from op_checks import op_files
from torch import Tensor

import evakernels

C = torch.ones(4)
CALLS: dict[str, dict[str, Any]] = {}
WRONG: dict[str, list[tuple[type[Exception], str, dict[str, Any]]]] = {}
for module in op_files().values():
    CALLS |= module.CALLS
    WRONG |= getattr(module, "WRONG", {})
NO_TENSORS = ("x", [1.0, 2.0], np.ones(4, np.float32), 1.0)
OF_ANY_DTYPE = ("grad_scale", "found_inf")


def arguments(*annotations: object) -> list[tuple[str, str]]:
    """Names of public ops, with those of their arguments that are annotated so."""
    return [
        (op, name)
        for op in CALLS
        for name, parameter in inspect.signature(getattr(evakernels, op)).parameters.items()
        if parameter.annotation in annotations
    ]


Wrong = tuple[str, dict[str, Any], type[Exception], str]
"""An op, the changed arguments of its right call, and the error's type and argument or size."""


def wrong_tensors() -> Iterator[Wrong]:
    for op, name in arguments(Tensor, Tensor | None):
        right = CALLS[op][name]
        for value in NO_TENSORS:
            yield op, {name: value}, TypeError, name
        yield op, {name: right.to("meta")}, ValueError, f"{name} on meta"
        if name not in OF_ANY_DTYPE:
            of_numbers = torch.float32 if name == "cu_seqlens" else torch.int32
            other = right.to(torch.int64 if right.is_floating_point() else of_numbers)
            yield op, {name: other}, TypeError, name
        if name != "cu_seqlens":
            yield op, {name: right.new_ones(7)}, ValueError, r"\(7,\)"
    for op, name in arguments(Tensor):
        yield op, {name: None}, TypeError, name


def wrong_lists() -> Iterator[Wrong]:
    for op, name in arguments(Sequence[Tensor]):
        first = rf"{name}\[0\]"
        for value in NO_TENSORS:
            yield op, {name: [value]}, TypeError, first
        for value in ("x", np.ones(1), torch.ones(1), None):
            yield op, {name: value}, TypeError, name
        yield op, {name: []}, ValueError, name
        yield op, {name: [torch.tensor(1)]}, TypeError, first
        if name != "steps":
            yield op, {name: [torch.eye(4).to_sparse()]}, TypeError, first
        if name not in ("params", "steps") and "params" in CALLS[op]:
            yield op, {name: [torch.ones(7)]}, ValueError, first
            yield op, {name: [C.to("meta")]}, ValueError, f"{first} on meta"


def wrong_numbers() -> Iterator[Wrong]:
    values = ((-1e-6, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("1e-6", TypeError))
    for op, name in arguments(float, float | None):
        if name == "eps":
            for value, exception in values:
                yield op, {name: value}, exception, name


GENERAL = [*wrong_tensors(), *wrong_lists(), *wrong_numbers()]
OWN = [
    pytest.param(op, changes, kind, name, marks=pytest.mark.cpu_only("elsewhere a wrong index ends the process"))
    for op, entries in WRONG.items()
    for kind, name, changes in entries
]


def test_every_public_op_has_a_right_call():
    public = {name for name, op in vars(evakernels.ops).items() if name in evakernels.ops.__all__ and callable(op)}
    assert set(CALLS) == public - {"as_torch_operators", "sample_token_index"}
    for op, name in arguments(Tensor, Tensor | None, Sequence[Tensor]):
        assert name in CALLS[op], (op, name)


@pytest.mark.parametrize("op", CALLS)
def test_right_call_is_accepted(op):
    getattr(evakernels, op)(**CALLS[op])


@pytest.mark.parametrize("op", sorted(CALLS.keys() - {"gradient_norm"}))  # no backend: torch's own operators
def test_explain_takes_the_public_call(op):
    before = copy.deepcopy(CALLS[op])
    told = evakernels.explain(op, **CALLS[op])
    assert told.count("selected") == 1
    torch.testing.assert_close(CALLS[op], before, rtol=0, atol=0)
    call = inspect.signature(getattr(evakernels, op)).bind(**CALLS[op])
    assert evakernels.explain(getattr(evakernels, op), *call.args, **call.kwargs) == told
    with pytest.raises(TypeError, match="no_such_argument"):
        evakernels.explain(op, *call.args, **call.kwargs, no_such_argument=1)


@pytest.mark.parametrize(("op", "changes", "exception", "name"), [*GENERAL, *OWN])
def test_wrong_input_names_the_argument(op, changes, exception, name):
    with pytest.raises(exception, match=f"^{op}: .*{name}"):
        getattr(evakernels, op)(**CALLS[op] | changes)
