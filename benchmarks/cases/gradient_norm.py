"""The norm of all gradients of a model, which clipping needs."""

import torch
from torch import Tensor

import evakernels
from benchmarks.cases import _optimizer
from benchmarks.cases._optimizer import SHAPES, Tensors
from benchmarks.operation import NVIDIA_APEX, Cost, Draw, Function, Inputs, Operation, Work, peer, register
from benchmarks.shapes import Shape


def _inputs(shape: Shape, draw: Draw) -> Inputs:
    return {"grads": [draw.normal(*size, scale=1e-3) for size in _optimizer.sizes_of(shape)]}


def _work(shape: Shape, itemsize: int) -> Work:
    """Reads every gradient once."""
    return Work(Cost(0, sum(size.numel() for size in _optimizer.sizes_of(shape)) * itemsize))


def _eager(grads: Tensors) -> Tensor:
    """As `torch.nn.utils.get_total_norm`, but with sums of 16-bit numbers in float32."""
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    total: Tensor = torch.stack(torch._foreach_norm(grads, 2, dtype=dtype)).norm()
    return total


register(
    Operation(
        name="gradient_norm",
        summary="the norm of all gradients of a model, without waiting for the device",
        inputs=_inputs,
        eager=_eager,
        ours=evakernels.gradient_norm,
        work=_work,
        shapes=SHAPES,
        raw=_optimizer.raw,
        registered="gradient_norm",
    )
)


@peer("gradient_norm", package="apex", devices=("cuda",), install=NVIDIA_APEX)
def apex(shape: Shape) -> Function:
    """NVIDIA apex's kernel."""
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    def norm(grads: Tensors) -> Tensor:
        overflow = torch.zeros(1, dtype=torch.int, device=grads[0].device)
        total: Tensor = multi_tensor_applier(amp_C.multi_tensor_l2norm, overflow, [grads], False)[0]
        return total.squeeze()

    return norm
