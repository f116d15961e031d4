"""`torch.nn.utils.clip_grad_norm_` on the library's norm of gradients."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..ops._dtensors import local
from ..ops.gradient_norm import gradient_norm

_SMALL = 1e-6  # as in torch, added to the norm


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`: scales gradients in place so that their total norm is at most `max_norm`.

    Squares are summed in float32, by `gradient_norm`. With an optimizer of this library, `grad_scale` clips without
    this pass over the gradients.

    Args:
        parameters: one or several, also DTensors and on several devices; their `grad` is scaled unless it is None.
        max_norm: maximum norm.
        norm_type: torch's function computes other norms than 2.
        error_if_nonfinite: raise if the norm is NaN or infinite, with synchronisation.
        foreach: without effect for norm 2.

    Returns:
        0-D, the norm before clipping: float32 (float64 if a gradient is float64), on the device of the first gradient;
        for DTensors of the whole tensors. 0.0 without a gradient.

    Raises:
        TypeError: for sparse and complex gradients.
        RuntimeError: for a norm that isn't finite, with `error_if_nonfinite`.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> evakernels.clip_grad_norm_([weight], max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if float(norm_type) != 2.0:
        norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
        return norm
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    norm = gradient_norm(grads)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"clip_grad_norm_: the norm of the gradients must be finite with error_if_nonfinite, got {norm.item()}"
        )
    factor = (max_norm / (norm + _SMALL)).clamp(max=1.0)
    alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for grad in map(local, grads):
        alike[grad.device, grad.dtype].append(grad)
    for (device, dtype), some in alike.items():
        # A factor may be below the smallest number of float16.
        factor_dtype = torch.float32 if dtype == torch.float16 else dtype
        # A non-blocking copy to the host may be read before it has arrived.
        torch._foreach_mul_(some, factor.to(device, factor_dtype, non_blocking=device.type != "cpu"))
    return norm
