"""One step of LAMB over all parameters of a model.

The variant is the paper's and apex's, called `nvlamb` here, because other libraries offer it too.
"""

from typing import Any

import torch

import evakernels
from benchmarks.cases._optimizer import (
    BETAS,
    EPS,
    LR,
    STEPS,
    Tensors,
    decays_of,
    directions,
    register_apex,
    register_step,
    step_by_decay,
)
from benchmarks.operation import Function, peer
from benchmarks.shapes import Shape


def _ours(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors) -> Tensors:
    state, rates = (exp_avgs, exp_avg_sqs, steps), ([LR] * len(params), decays_of(params))
    evakernels.lamb_step(params, grads, *state, *rates, betas=BETAS, eps=EPS, variant="nvlamb")
    return params


def _eager(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors) -> Tensors:
    """One tensor after the other."""
    for param, update, decay in directions(params, grads, exp_avgs, exp_avg_sqs, steps):
        if decay:
            weight = param.to(update.dtype)
            update.add_(weight, alpha=decay)
            norm, update_norm = weight.norm(), update.norm()
            update *= torch.where((norm > 0) & (update_norm > 0), norm / update_norm, 1.0)
        param.add_(update, alpha=-LR)
    return params


register_step("lamb_step", "LAMB", "lamb_step", _eager, _ours)


@peer("lamb_step", package="timm")
def timm(shape: Shape) -> Function:
    """timm's LAMB, the function behind its optimizer, without the clipping of gradients that it adds by default."""
    from timm.optim.lamb import lamb

    # timm counts the steps on the host; their number changes no cost, so it stays at the first.
    options: dict[str, Any] = {f"bias_correction{n}": 1 - beta ** (STEPS + 1) for n, beta in enumerate(BETAS, start=1)}
    options |= {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "beta3": 1 - BETAS[0], "eps": EPS, "max_lr": None}
    options |= dict.fromkeys(("decoupled_decay", "trust_clip", "always_adapt", "caution"), False)

    def step(decay: float, lists: list[Tensors]) -> None:
        params, grads, exp_avgs, exp_avg_sqs, _ = lists
        lamb(params, grads, exp_avgs, exp_avg_sqs, weight_decay=decay, **options)

    return step_by_decay(step)


# apex's kernel behind `FusedLAMB`, without the gradients' norm that `FusedLAMB` always takes; it overwrites the
# gradients. Bias correction 1, averaged gradients 1, decoupled decay 1; no ratio without decay.
register_apex(
    "lamb_step",
    "multi_tensor_lamb",
    lambda decay, device: (
        *(LR, *BETAS, EPS, STEPS + 1, 1, decay, 1, 1),
        *(torch.zeros(1, device=device), 1.0, False),
    ),
)
