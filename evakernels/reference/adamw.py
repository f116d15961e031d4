"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over lists of tensors.

    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    w = (1 - lr * decay) w - lr * m' / (sqrt(v') + eps)

with m' = m / (1 - beta1^t), v' = v / (1 - beta2^t). All is computed in float32 (float64 for float64 parameters),
whatever the parameters and moments are stored in, and the step is that of the moments before they are rounded. Nothing
waits for the device.
"""

from collections.abc import Sequence

from torch import Tensor

from evakernels.reference._numerics import accumulation_dtype
from evakernels.reference._optimizer import bias, changed_moments, rounded, write


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
) -> None:
    beta1, beta2, eps = betas_and_eps
    for i, (w, g, m, v, t, lr, decay) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, steps, lrs, weight_decays, strict=True)
    ):
        g = g.to(accumulation_dtype(w))
        average, average_sq = changed_moments(g, m, v, beta1, beta2, grad_scale)
        write(t, t + 1, found_inf)
        denominator = (average_sq / bias(beta2, t, g)).sqrt() + eps
        step = average / bias(beta1, t, g) / denominator
        value = (1 - lr * decay) * w.to(g.dtype) - lr * step
        write(w, rounded(value, i, t, seeds, first_elements), found_inf)
        write(m, average, found_inf)
        write(v, average_sq, found_inf)
