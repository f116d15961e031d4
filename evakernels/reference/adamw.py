"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over lists of tensors, as torch's fused step makes it.

    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    w = (1 - lr * decay) w - lr * m' / (sqrt(v') + eps)

with m' = m / (1 - beta1^t), v' = v / (1 - beta2^t). The fused step needs dense tensors of equal dtypes, so it gets
float32 copies (float64 for float64 parameters) of others, and results are rounded to the stored dtypes.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import accumulation_dtype
from ._optimizer import round_stochastically

_PART = 2**18
"""Elements of a copy, which stays in the cache."""


def adamw_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lrs: list[float],
    weight_decays: list[float],
    betas_and_eps: list[float],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seeds: Sequence[int],
    first_elements: Sequence[int],
    device_lrs: Tensor | None = None,
) -> None:
    beta1, beta2, eps = betas_and_eps
    skip = None if found_inf is None else (found_inf.reshape(()) > 0).float()
    factor = None if grad_scale is None else grad_scale.reshape(()).reciprocal()
    torch._foreach_add_(steps, 1.0 if skip is None else 1.0 - skip)
    for i, (step, lr, decay) in enumerate(zip(steps, lrs, weight_decays, strict=True)):
        dtype = accumulation_dtype(params[i])
        rate = lr if device_lrs is None else device_lrs[i].float()
        for number, parts in enumerate(_parts(params[i], exp_avgs[i], exp_avg_sqs[i], grads[i])):
            w, m, v, g = (part.to(dtype).contiguous() for part in parts)
            if factor is not None:
                g = (g * factor).to(dtype) if g is parts[3] else g.mul_(factor)
            torch._fused_adamw_(
                [w], [g], [m], [v], [], [step], lr=rate, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps,
                amsgrad=False, maximize=False, found_inf=skip,
            )  # fmt: skip
            if seeds:
                w = round_stochastically(w, seeds[i], step, first_elements[i] + number * _PART)
            for part, value in zip(parts, (w, m, v), strict=False):
                if value is not part:
                    part.copy_(value)
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])  # the fused step doesn't


def _parts(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors in parts of `_PART` elements; whole if they are small or not contiguous."""
    if tensors[0].numel() <= _PART or not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.view(-1).split(_PART) for tensor in tensors), strict=True)
