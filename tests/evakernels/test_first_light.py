"""Each op that the sources bind for GPUs has its kernel, launches, and gives its reference's result.

The first test on a new GPU. A missing kernel is a failure: the other tests skip calls that a backend doesn't support.
"""

import copy
import re

import pytest
import small_calls
import torch
from on_device import DEVICE
from op_suite import ROOT

import evakernels.triton
from benchmarks import accuracy
from evakernels import _native, backends

pytest.importorskip("triton", reason="arguments of calls are in the files of the Triton kernels")

LARGEST_ERROR = 0.03
"""Relative to float64, in bfloat16: a wrong formula or layout is far above."""
BINDINGS = [path.read_text() for path in sorted((ROOT / "csrc/bind").glob("*.cpp"))]
COMPILED = [
    op
    for text in BINDINGS
    if re.search(r"^EVAKERNELS_OPS\(", text, re.MULTILINE)
    for op in re.findall(r"EVAKERNELS_OP\(\s*m, (\w+)", text)
]
TRITON = [op for ops in evakernels.triton.FAMILIES.values() for op in ops]
CASES = [(op, DEVICE.type) for op in COMPILED]
if DEVICE.type == "cuda" or evakernels.triton.INTERPRETED:
    CASES += [(op, "triton") for op in TRITON]


@pytest.mark.skipif(not _native.LOADED and DEVICE.type == "cpu", reason="the compiled library isn't built")
@pytest.mark.parametrize(("op", "backend"), CASES)
def test_kernel_matches_reference(op, backend):
    arguments = small_calls.arguments(op, str(DEVICE), torch.bfloat16)
    if DEVICE.type == "cuda":
        assert not backends.why_not(op, backend)
    elif reasons := backends.why_not(op, backend, *arguments):
        pytest.skip("; ".join(reasons))
    implementations = backends._implementations[op]
    result = tensors_of(implementations[backend].function, arguments)
    exact = accuracy.as_double({str(place): argument for place, argument in enumerate(arguments)})
    expected = tensors_of(implementations["reference"].function, tuple(exact.values()))
    assert len(result) == len(expected)
    assert accuracy.relative_error(result, expected) <= LARGEST_ERROR


def tensors_of(function, arguments):
    """The tensors that an implementation returns, and those arguments that it changes."""
    own = copy.deepcopy(arguments)
    returned = accuracy.tensors(function(*own))
    pairs = zip(backends.tensors(own), backends.tensors(arguments), strict=True)
    return [*returned, *(after for after, before in pairs if not torch.equal(after, before))]
