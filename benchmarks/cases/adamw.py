"""One step of AdamW over all parameters of a model, each function given lists of tensors as in the case of LAMB."""

import torch

import evakernels
from benchmarks.cases._optimizer import (
    BETAS,
    EPS,
    LR,
    STEPS,
    Tensors,
    by_decay,
    decays_of,
    directions,
    register_step,
)
from benchmarks.operation import NVIDIA_APEX, Function, peer
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
    """PyTorch's own kernel, behind `torch.optim.AdamW(fused=True)`: one call for each weight decay."""

    def step(params: Tensors, steps: Tensors, **lists: Tensors) -> Tensors:
        torch._foreach_add_(steps, 1)
        for decay, (group, grads, exp_avgs, exp_avg_sqs) in by_decay(params, **lists):
            torch._fused_adamw_(
                group,
                grads,
                exp_avgs,
                exp_avg_sqs,
                max_exp_avg_sqs=[],
                state_steps=steps[: len(group)],  # all are at the same one
                lr=LR,
                beta1=BETAS[0],
                beta2=BETAS[1],
                weight_decay=decay,
                eps=EPS,
                amsgrad=False,
                maximize=False,
            )
        return params

    return step


@peer("adamw_step", package="apex", devices=("cuda",), install=NVIDIA_APEX)
def apex(shape: Shape) -> Function:
    """NVIDIA apex's AdamW, the kernel behind `FusedAdam`: one call for each weight decay."""
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    def step(params: Tensors, steps: Tensors, **lists: Tensors) -> Tensors:
        overflow = torch.zeros(1, dtype=torch.int, device=params[0].device)
        for decay, (group, grads, *moments) in by_decay(params, **lists):
            # AdamW 1, bias correction 1.
            options = (LR, *BETAS, EPS, STEPS + 1, 1, 1, decay)
            multi_tensor_applier(amp_C.multi_tensor_adam, overflow, [grads, group, *moments], *options)
        return params

    return step
