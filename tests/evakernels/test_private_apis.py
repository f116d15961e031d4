"""torch's and Triton's private names that evakernels uses, and the feature that needs each.

The features' own tests check what the functions do; these name the cause where a release of torch lacks one.
"""

import inspect
from operator import attrgetter

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.cpu_only("the functions are the same on every device")

FEATURES = {
    "_C._len_torch_dispatch_stack": "the fast path of plain calls (_modes.py)",
    "_C._is_torch_function_mode_enabled": "the fast path of plain calls (_modes.py)",
    "_C._are_functorch_transforms_active": "torch.func transforms of ops (_modes.py)",
    "autograd.forward_ad._current_level": "forward-mode differentiation of ops (_modes.py)",
    "utils._python_dispatch._disable_current_modes": "accelerate's comparison of modules (dropin/_comparison.py)",
    "_C._get_tracing_state": "torch.jit.trace of accelerated modules (dropin/_dispatch.py)",
    "_C._functorch.is_legacy_batchedtensor": "is_grads_batched with the fast path (ops/_fast.py)",
    "_C._any_requires_grad": "gradients of ops (_modes.py, ops/_fast.py)",
    "_C._is_any_autocast_enabled": "autocast with the fast path (ops/_fast.py)",
    "_C._autograd._top_saved_tensors_default_hooks": "activation checkpointing of swiglu_mlp (_modes.py)",
    "ops.aten.add.Tensor._op": "calls of compiled kernels (_native.py)",
    "_C._AutoDispatchBelowAutograd": "gradients of ops through the dispatcher (ops/_op.py)",
    "_C._stash_obj_in_tls": "use_backend and observed_by in backward passes (backends.py)",
    "_C._get_obj_in_tls": "use_backend and observed_by in backward passes (backends.py)",
    "_C._is_key_in_tls": "use_backend and observed_by in backward passes (backends.py)",
    "_C._dispatch_has_kernel_for_dispatch_key": "the choice of compiled kernels (_native.py)",
    "_C.DisableTorchFunctionSubclass": "frozen weights (nn/frozen.py)",
    "_C._get_mkldnn_enabled": "nn.linear and freeze (nn/linear.py, nn/frozen.py)",
    "ops.mkldnn._is_mkldnn_bf16_supported": "nn.linear and freeze (nn/linear.py, nn/frozen.py)",
    "ops.mkldnn._reorder_linear_weight": "freeze (nn/frozen.py)",
    "ops.mkldnn._linear_pointwise": "nn.linear and freeze (nn/linear.py, nn/frozen.py)",
    "_foreach_norm": "optimizers, gradient_norm and clip_grad_norm_",
    "_fused_adamw_": "AdamW on CPUs (reference/adamw.py)",
    "ops.aten._unsafe_view": "nn.linear (nn/linear.py)",
}


@pytest.mark.parametrize("name", FEATURES)
def test_private_name_exists(name: str) -> None:
    try:
        attrgetter(name)(torch)
    except AttributeError as error:
        pytest.fail(f"torch {torch.__version__} lacks torch.{name}, which is needed by {FEATURES[name]}: {error}")


def test_module_has_hooks_and_compiled_call() -> None:
    """Fused modules look at them (_modes.py)."""
    module = nn.Linear(2, 2)
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    assert all(not getattr(module, name) for name in hooks)
    assert module._compiled_call_impl is None


def test_constant_result_is_marked() -> None:
    """For ops in torch.compile (_modes.py)."""
    assert torch.compiler.assume_constant_result(lambda: True)._dynamo_marked_constant


def test_qlinear_multiplies_codes() -> None:
    """freeze in int8 (nn/frozen.py): any processor takes these arguments; without VNNI sums may saturate."""
    packed = torch.ops.onednn.qlinear_prepack(torch.ones(4, 8, dtype=torch.int8), None)
    codes, scale, zeros = torch.ones(3, 8, dtype=torch.uint8), torch.ones(4), torch.zeros(4, dtype=torch.int64)
    multiply = torch.ops.onednn.qlinear_pointwise
    y = multiply(codes, 1.0, 0, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    assert torch.equal(y, torch.full((3, 4), 8.0))


@pytest.mark.skipif(torch.version.cuda is None, reason="torch for CPUs has no driver")
def test_cuda_driver_has_a_version() -> None:
    """The check of the CUDA driver needs it (_native.py)."""
    assert torch._C._cuda_getDriverVersion() >= 0


def test_triton_run_has_a_grid() -> None:
    """`python -m evakernels.tuning` replaces it (tuning/search.py)."""
    run = pytest.importorskip("triton.runtime.jit").JITFunction.run
    assert {"grid", "warmup"} <= set(inspect.signature(run).parameters)
