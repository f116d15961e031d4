"""torch's and Triton's private functions that evakernels calls: each does what the named feature needs."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.cpu_only("the functions are the same on every device")


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def ones(*shape):
    return torch.ones(shape, requires_grad=True)


def inside(context, query):
    """What a query returns outside and inside of a context."""
    outside = query()
    with context:
        return outside, query()


def seen_in_backward(query, **options):
    """What a query of the gradient returns in a backward pass."""
    x, found = ones(2), []
    y = x.clone()
    y.register_hook(lambda gradient: found.append(query(gradient)))
    torch.autograd.grad(y, x, torch.ones(2, 2) if options else torch.ones(2), **options)
    return found


def dispatch_modes():
    return inside(DispatchMode(), torch._C._len_torch_dispatch_stack) == (0, 1)


def disabled_modes():
    with DispatchMode(), _disable_current_modes():
        return torch._C._len_torch_dispatch_stack() == 0


def function_modes():
    return inside(BaseTorchFunctionMode(), torch._C._is_torch_function_mode_enabled) == (False, True)


def transforms():
    found = []
    torch.func.vmap(lambda x: found.append(torch._C._are_functorch_transforms_active()) or x)(torch.ones(2))
    return [torch._C._are_functorch_transforms_active(), *found] == [False, True]


def forward_mode():
    return inside(forward_ad.dual_level(), lambda: forward_ad._current_level) == (-1, 0)


def tracing():
    found = []
    torch.jit.trace(lambda x: found.append(torch._C._get_tracing_state() is not None) or x + 1, torch.ones(2))
    return torch._C._get_tracing_state() is None and found[0]


def batched_gradients():
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    return seen_in_backward(is_batched) == [False] and seen_in_backward(is_batched, is_grads_batched=True) == [True]


def requires_grad():
    return torch._C._any_requires_grad(torch.ones(1), 2.0, ones(1)) and not torch._C._any_requires_grad(torch.ones(1))


def autocast():
    return inside(torch.autocast("cpu"), torch._C._is_any_autocast_enabled) == (False, True)


def checkpoint_hooks():
    found = []

    def function(x):
        found.append(torch._C._autograd._top_saved_tensors_default_hooks(False)[0].__module__)
        return x * 2

    checkpoint(function, ones(2), use_reentrant=False).sum().backward()
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None and found[0] == "torch.utils.checkpoint"


def overload_handle():
    return torch.equal(torch.ops.aten.add.Tensor._op(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))


def function_apply():
    x = ones(2)
    super(torch.autograd.Function, Doubled).apply(x).sum().backward()
    return torch.equal(x.grad, torch.full((2,), 2.0))


def below_autograd():
    x = ones(2)
    with torch._C._AutoDispatchBelowAutograd():
        return not (x * 2).requires_grad


def constant_result():
    return torch.compiler.assume_constant_result(lambda: True)._dynamo_marked_constant


def objects_of_threads():
    torch._C._stash_obj_in_tls("evakernels.test", "value")
    in_backward = seen_in_backward(lambda gradient: torch._C._get_obj_in_tls("evakernels.test"))
    return in_backward == ["value"] and not torch._C._is_key_in_tls("evakernels.other")


def kernel_of_device():
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel("aten::add.Tensor", "CPU") and not has_kernel("aten::_flash_attention_forward", "CPU")


def subclass_switch():
    class Other(torch.Tensor):
        pass

    x = torch.ones(2).as_subclass(Other)
    with torch._C.DisableTorchFunctionSubclass():
        return type(x + 1) is torch.Tensor


def linear_by_onednn():
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    y = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    torch.testing.assert_close(torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), y)
    torch.testing.assert_close(y, F.linear(x, weight))
    return torch._C._get_mkldnn_enabled() and torch.ops.mkldnn._is_mkldnn_bf16_supported() in (True, False)


def linear_in_int8():
    """On any processor the op takes these arguments; without VNNI its sums may saturate."""
    packed = torch.ops.onednn.qlinear_prepack(torch.ones(4, 8, dtype=torch.int8), None)
    codes, scale, zeros = torch.ones(3, 8, dtype=torch.uint8), torch.ones(4), torch.zeros(4, dtype=torch.int64)
    multiply = torch.ops.onednn.qlinear_pointwise
    y = multiply(codes, 1.0, 0, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return torch.equal(y, torch.full((3, 4), 8.0))


def lists_of_tensors():
    some, one = [torch.ones(2), torch.ones(3)], torch.ones(())
    torch._foreach_mul_(some, 2 * one)
    torch._foreach_add_(some, 1.0)
    torch._foreach_copy_(some, [x + 1 for x in some])
    return [x.item() for x in torch._foreach_norm(some, float("inf"), dtype=torch.float64)] == [4.0, 4.0]


def fused_adamw():
    w, g, m, v, step = torch.ones(2), torch.ones(2), torch.zeros(2), torch.zeros(2), torch.ones(())
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
    torch._fused_adamw_([w], [g], [m], [v], [], [step], **options, amsgrad=False, maximize=False, found_inf=None)
    torch.testing.assert_close(w, torch.full((2,), 0.9))
    return True


def view_without_alias():
    return torch.ops.aten._unsafe_view(torch.ones(4), (2, 2))._base is None


def compiled_forward():
    module = nn.Linear(2, 2)
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return all(not getattr(module, name) for name in hooks) and module._compiled_call_impl is None


def driver_version():
    return torch.version.cuda is None or torch._C._cuda_getDriverVersion() >= 0


def triton_run():
    run = pytest.importorskip("triton.runtime.jit").JITFunction.run
    return {"grid", "warmup"} <= set(inspect.signature(run).parameters)


FEATURES = {
    dispatch_modes: "the fast path of plain calls (_modes.py)",
    disabled_modes: "accelerate's comparison of modules (dropin/_comparison.py)",
    function_modes: "the fast path of plain calls (_modes.py)",
    transforms: "torch.func transforms of ops (_modes.py)",
    forward_mode: "forward-mode differentiation of ops (_modes.py)",
    tracing: "torch.jit.trace of accelerated modules (dropin/_dispatch.py)",
    batched_gradients: "is_grads_batched with the fast path (ops/_fast.py)",
    requires_grad: "gradients of ops (_modes.py, ops/_fast.py)",
    autocast: "autocast with the fast path (ops/_fast.py)",
    checkpoint_hooks: "activation checkpointing of swiglu_mlp (_modes.py)",
    overload_handle: "calls of compiled kernels (_native.py)",
    function_apply: "gradients in the fast path (ops/_fast.py)",
    below_autograd: "gradients of ops through the dispatcher (ops/_op.py)",
    constant_result: "ops in torch.compile (_modes.py)",
    objects_of_threads: "use_backend and observed_by in backward passes (backends.py)",
    kernel_of_device: "the choice of compiled kernels (_native.py)",
    subclass_switch: "frozen weights (nn/frozen.py)",
    linear_by_onednn: "nn.linear and freeze (nn/linear.py, nn/frozen.py)",
    linear_in_int8: "freeze in int8 (nn/frozen.py)",
    lists_of_tensors: "optimizers, gradient_norm and clip_grad_norm_",
    fused_adamw: "AdamW on CPUs (reference/adamw.py)",
    view_without_alias: "nn.linear (nn/linear.py)",
    compiled_forward: "hooks and module.compile() of fused modules (_modes.py)",
    driver_version: "the check of the CUDA driver (_native.py)",
    triton_run: "python -m evakernels.tuning (tuning/search.py)",
}


@pytest.mark.parametrize("probe", FEATURES, ids=lambda probe: probe.__name__)
def test_private_api_works(probe):
    try:
        works, reason = probe(), ""
    except Exception as error:
        works, reason = False, f": {type(error).__name__}: {error}"
    assert works, f"torch {torch.__version__} changed what {FEATURES[probe]} depends on{reason}"
