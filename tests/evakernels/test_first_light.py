"""Each op but those named WITHOUT_GPU_KERNEL has its kernel for GPUs, launches, and gives its reference's result.

The first test on a new GPU. A missing kernel is a failure: the other tests skip calls that a backend doesn't support.
"""

import copy

import pytest
import torch
from on_device import DEVICE
from op_checks import Recorder, op_files, with_gradients
from test_wrong_input import CALLS
from torch import Tensor
from torch.utils._pytree import tree_map_only

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


def record_calls():
    """Arguments of a small call by op: the case of the test files with the most tensors, or an optimizer step."""
    with Recorder() as recorder, evakernels.use_backend("reference"):
        for module in op_files().values():
            for case in getattr(module, "CASES", ()):
                (ours, _), inputs = case.values
                if case.id in module.TRANSFORMED:
                    given = [None if x is None else x.bfloat16() for x in inputs]
                    with_gradients(ours, given)
                    with torch.no_grad():
                        ours(*given)
        for op in ("adamw_update", "lamb_update", "lamb_apply"):
            getattr(evakernels, op)(**tree_map_only(Tensor, Tensor.clone, CALLS[op] | {"found_inf": None}))
    calls = sorted(recorder.own_calls(), key=lambda call: sum(isinstance(x, Tensor) for x in call[1]))
    return {op.name().partition("::")[2]: arguments for op, arguments in calls}


ARGUMENTS = record_calls()


@pytest.mark.skipif(not _native.LOADED and DEVICE.type == "cpu", reason="the compiled library isn't built")
@pytest.mark.parametrize(("op", "backend"), CASES)
def test_kernel_matches_reference(op, backend):
    given = tree_map_only(Tensor, Tensor.detach, ARGUMENTS[op])
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
    """The tensors that an implementation returns, and those arguments that it changes."""
    own = copy.deepcopy(arguments)
    returned = accuracy.tensors(function(*own))
    pairs = zip(backends.tensors(own), backends.tensors(arguments), strict=True)
    return [*returned, *(after for after, before in pairs if not torch.equal(after, before))]
