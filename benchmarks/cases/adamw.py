"""One step of AdamW over all parameters of a model."""

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
    state, lrs = (exp_avgs, exp_avg_sqs, steps), [LR] * len(params)
    evakernels.adamw_update(params, grads, *state, lrs, decays_of(params), betas=BETAS, eps=EPS)
    return params


def _eager(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors) -> Tensors:
    """One tensor after the other."""
    for param, update, decay in directions(params, grads, exp_avgs, exp_avg_sqs, steps):
        param.mul_(1 - LR * decay).add_(update, alpha=-LR)
    return params


register_step("adamw_step", "AdamW", "adamw_update", _eager, _ours)


@peer("adamw_step", "torch fused")
def torch_fused(shape: Shape) -> Function:
    """PyTorch's kernel behind `torch.optim.AdamW(fused=True)`: one call for each weight decay."""

    def step(decay: float, lists: list[Tensors]) -> None:
        params, grads, exp_avgs, exp_avg_sqs, steps = lists
        rates: dict[str, Any] = {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": decay, "eps": EPS}
        torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, [], steps, **rates, amsgrad=False, maximize=False)

    return step_by_decay(step, advance=True)


# AdamW 1, bias correction 1.
register_apex("adamw_step", "multi_tensor_adam", lambda decay, device: (LR, *BETAS, EPS, STEPS + 1, 1, 1, decay))
