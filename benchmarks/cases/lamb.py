"""One step of LAMB over all parameters of a model.

The variant is the paper's and apex's, called `nvlamb` here, because it is the one that others offer too. Functions of
lists of tensors are measured, not optimizer objects: on every side they are what an optimizer's `step` comes down to,
and nothing has to be kept between calls.
"""

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

    beta1, beta2 = BETAS

    def step(params: Tensors, steps: Tensors, **lists: Tensors) -> Tensors:
        # timm counts the steps on the host. Which one it is changes no cost, so that it stays at the first.
        for decay, (group, grads, exp_avgs, exp_avg_sqs) in by_decay(params, **lists):
            lamb(
                group,
                grads,
                exp_avgs,
                exp_avg_sqs,
                lr=LR,
                beta1=beta1,
                beta2=beta2,
                beta3=1 - beta1,
                bias_correction1=1 - beta1 ** (STEPS + 1),
                bias_correction2=1 - beta2 ** (STEPS + 1),
                eps=EPS,
                weight_decay=decay,
                decoupled_decay=False,
                max_lr=None,
                trust_clip=False,
                always_adapt=False,
                caution=False,
            )
        return params

    return step


@peer("lamb_step", package="apex", devices=("cuda",), install=NVIDIA_APEX)
def apex(shape: Shape) -> Function:
    """NVIDIA apex's LAMB, the kernel behind `FusedLAMB`, without the gradients' norm that `FusedLAMB` always takes.

    It leaves the direction of the step in the place of the gradients.
    """
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    def step(params: Tensors, steps: Tensors, **lists: Tensors) -> Tensors:
        overflow = torch.zeros(1, dtype=torch.int, device=params[0].device)
        no_norm = torch.zeros(1, device=params[0].device)
        for decay, (group, grads, *moments) in by_decay(params, **lists):
            tensors = [grads, group, *moments]
            # Bias correction 1, averaged gradients 1, decoupled decay 1; no ratio where there is no decay.
            options = (LR, *BETAS, EPS, STEPS + 1, 1, decay, 1, 1, no_norm, 1.0, False)
            multi_tensor_applier(amp_C.multi_tensor_lamb, overflow, tensors, *options)
        return params

    return step
