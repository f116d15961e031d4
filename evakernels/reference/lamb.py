"""LAMB (You et al. 2020, arXiv 1904.00962), two phases over lists of tensors.

    phase 1   m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  norms of w and of the direction u
    phase 2   w = w - lr * ratio * u

    deepspeed   u = m / (sqrt(v) + eps) + decay * w;    ratio = correction * clip(|w| / |u|, 0.01, 10)
    nvlamb      u = m' / (sqrt(v') + eps) + decay * w;  ratio = |w| / |u|, 1 for a tensor without decay

with m' = m / (1 - beta1^t), v' = v / (1 - beta2^t), correction = sqrt(1 - beta2^t) / (1 - beta1^t), and
|w| / |u| replaced by 1 where either norm is 0. All is computed in float32 (float64 for float64 parameters),
whatever the parameters and moments are stored in. Nothing waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import accumulation_dtype
from ._optimizer import bias, rounded, updated_moments, write

DEEPSPEED_RATIO = (0.01, 10.0)


def lamb_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    weight_decays: list[float],
    betas_and_eps: list[float],
    nvlamb: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Tensor:
    beta1, beta2, _ = betas_and_eps
    norms = []
    for w, g, m, v, t, decay in zip(params, grads, exp_avgs, exp_avg_sqs, steps, weight_decays, strict=True):
        g = g.to(accumulation_dtype(w))
        average, average_sq = updated_moments(g, m, v, beta1, beta2, grad_scale)
        write(m, average, found_inf)
        write(v, average_sq, found_inf)
        write(t, t + 1, found_inf)
        u = _direction(w, m, v, t, decay, betas_and_eps, nvlamb)
        norms.append(torch.stack([w.to(g.dtype).square().sum(), u.square().sum()]))
    return torch.stack(norms)


def lamb_apply(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    squared_norms: Tensor,
    lrs: list[float],
    weight_decays: list[float],
    betas_and_eps: list[float],
    nvlamb: bool,
    found_inf: Tensor | None,
    seeds: Sequence[int],
    first_elements: Sequence[int],
    device_lrs: Tensor | None = None,
) -> None:
    beta1, beta2, _ = betas_and_eps
    w_norms, u_norms = squared_norms.sqrt().unbind(1)
    ratios = torch.where((w_norms > 0) & (u_norms > 0), w_norms / u_norms, 1.0)
    for i, (w, m, v, t, lr, decay) in enumerate(
        zip(params, exp_avgs, exp_avg_sqs, steps, lrs, weight_decays, strict=True)
    ):
        u = _direction(w, m, v, t, decay, betas_and_eps, nvlamb)
        if not nvlamb:
            u *= ratios[i].clamp(*DEEPSPEED_RATIO) * bias(beta2, t, u).sqrt() / bias(beta1, t, u)
        elif decay != 0:
            u *= ratios[i]
        rate = lr if device_lrs is None else device_lrs[i]
        write(w, rounded(w.to(u.dtype) - rate * u, i, t, seeds, first_elements), found_inf)


def _direction(
    w: Tensor, m: Tensor, v: Tensor, t: Tensor, decay: float, betas_and_eps: list[float], nvlamb: bool
) -> Tensor:
    beta1, beta2, eps = betas_and_eps
    # From the stored moments in both phases, so that the norms belong to the step.
    w = w.to(accumulation_dtype(w))
    m, v = m.to(w.dtype), v.to(w.dtype)
    if nvlamb:
        m, v = m / bias(beta1, t, w), v / bias(beta2, t, w)
    return m / (v.sqrt() + eps) + decay * w
