"""Each op but those named WITHOUT_GPU_KERNEL has its kernel for GPUs, launches, and gives its reference's result.

The first test on a new GPU. A missing kernel is a failure: the other tests skip calls that a backend doesn't support.
"""

import copy

import pytest
import torch
from on_device import DEVICE
from op_checks import record_calls

import evakernels.triton
from benchmarks import accuracy
from evakernels import _native, backends

LARGEST_ERROR = 0.03
"""Relative to float64, in bfloat16: a wrong formula or layout is far above."""
WITHOUT_GPU_KERNEL = {"adamw_update", "dequantize_rows", "quantize_rows"}
WITHOUT_GPU_KERNEL |= {"lamb_apply", "lamb_update", "resize", "swiglu_mlp_backward", "swiglu_mlp_forward"}
TRITON = [op for ops in evakernels.triton.FAMILIES.values() for op in ops]
CASES = [(op, DEVICE.type) for op in backends.ops() if op not in WITHOUT_GPU_KERNEL]
if DEVICE.type == "cuda" or evakernels.triton.INTERPRETED:
    CASES += [(op, "triton") for op in TRITON]


# The call with the most tensors, which uses all options.
ARGUMENTS = {
    op: max(calls, key=lambda arguments: len(list(backends.tensors(arguments))))
    for op, calls in record_calls(torch.bfloat16).items()
}


@pytest.mark.skipif(not _native.LOADED and DEVICE.type == "cpu", reason="the compiled library isn't built")
@pytest.mark.parametrize(("op", "backend"), CASES)
def test_kernel_matches_reference(op, backend):
    given = ARGUMENTS[op]
    if op == "contrastive_backward" and backend != "triton":
        given = (*given[:8], None, *given[9:])  # only Triton's kernel reads saved logits
    if DEVICE.type == "cuda":
        assert not backends.unsupported_reasons(op, backend)
    elif reasons := backends.unsupported_reasons(op, backend, *given):
        pytest.skip("; ".join(reasons))
    implementations = backends._implementations[op]
    result = tensors_of(implementations[backend].function, given)
    exact = accuracy.as_double({str(place): argument for place, argument in enumerate(given)})
    expected = tensors_of(implementations["reference"].function, tuple(exact.values()))
    assert len(result) == len(expected)
    assert accuracy.relative_error(result, expected) <= LARGEST_ERROR


def tensors_of(function, arguments):
    """The tensors with elements that an implementation returns, and those arguments that it changes."""
    own = copy.deepcopy(arguments)
    returned = [tensor for tensor in accuracy.tensors(function(*own)) if tensor.numel()]
    pairs = zip(backends.tensors(own), backends.tensors(arguments), strict=True)
    return [*returned, *(after for after, before in pairs if not torch.equal(after, before))]
