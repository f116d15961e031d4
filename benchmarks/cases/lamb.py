"""One step of LAMB over all parameters of a model.

The variant is the paper's and apex's, called `nvlamb` here, because it is the one that others offer too. Functions of
lists of tensors are measured, not optimizer objects: on every side they are what an optimizer's `step` comes down to,
and nothing has to be kept between calls.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

import evakernels
from benchmarks.operation import NVIDIA_APEX, Cost, Draw, Function, Inputs, Operation, Work, peer, register
from benchmarks.shapes import Shape, short_names
from evaclip import create_model

LR, BETAS, EPS, WEIGHT_DECAY = 1e-2, (0.9, 0.98), 1e-6, 0.05
STEPS = 10
"""Steps made before the one that is measured."""

Tensors = list[Tensor]

_SHAPES = {
    "cpu": ("tiny@32 b1",),
    "cuda": ("eva02-b16@224 b1", "eva02-l14@224 b1", "eva01-g14@224 b1"),
}


@cache
def parameter_sizes(model: str) -> tuple[torch.Size, ...]:
    """Of all parameters of a model."""
    parameters = create_model(short_names()[model], device="meta").parameters()
    return tuple(parameter.shape for parameter in parameters)


def _inputs(shape: Shape, draw: Draw) -> Inputs:
    """Parameters and gradients in the dtype measured, moments in float32. Batch and tower don't matter."""
    sizes = parameter_sizes(shape.model)
    moments = [[draw.normal(*size, scale=1e-3, dtype=torch.float32) for size in sizes] for _ in range(2)]
    return {
        "params": [draw.normal(*size, scale=0.02) for size in sizes],
        "grads": [draw.normal(*size, scale=1e-3) for size in sizes],
        "exp_avgs": moments[0],
        "exp_avg_sqs": [values.square_() for values in moments[1]],
        "steps": [torch.tensor(float(STEPS), device=draw.device) for _ in sizes],
    }


def _decays(params: Sequence[Tensor]) -> list[float]:
    """Matrices and embeddings are decayed; biases, the factors of norms and the temperature are not."""
    return [WEIGHT_DECAY if param.ndim > 1 else 0.0 for param in params]


def _work(shape: Shape, itemsize: int) -> Work:
    """Reads parameter, gradient and two moments, writes parameter and moments: 28 bytes a parameter in float32.

    A tensor's norm must be known before any of it is written. Where a tensor is larger than the cache, its moments and
    itself are read a second time for that, 40 bytes in all; the formula counts each input once, as everywhere.
    """
    sizes = parameter_sizes(shape.model)
    parameters, steps = sum(size.numel() for size in sizes), len(sizes)
    return Work(Cost(0, parameters * (3 * itemsize + 4 * 4) + steps * 2 * 4))


def _ours(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors) -> Tensors:
    state, decays = (exp_avgs, exp_avg_sqs, steps), _decays(params)
    norms = evakernels.lamb_update(params, grads, *state, decays, betas=BETAS, eps=EPS, variant="nvlamb")
    lrs = [LR] * len(params)
    evakernels.lamb_apply(params, *state, norms, lrs, decays, betas=BETAS, eps=EPS, variant="nvlamb")
    return params


def _eager(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors) -> Tensors:
    """One tensor after the other."""
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, steps, _decays(params), strict=True)
    for param, grad, exp_avg, exp_avg_sq, step, decay in tensors:
        _update_moments(grad.to(exp_avg.dtype), exp_avg, exp_avg_sq, step)
        update = exp_avg / (1 - BETAS[0] ** step)
        update /= (exp_avg_sq / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
        if decay:
            weight = param.to(update.dtype)
            update.add_(weight, alpha=decay)
            norm, update_norm = weight.norm(), update.norm()
            update *= torch.where((norm > 0) & (update_norm > 0), norm / update_norm, 1.0)
        param.add_(update, alpha=-LR)
    return params


def _update_moments(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor) -> None:
    step += 1
    exp_avg.lerp_(grad, 1 - BETAS[0])
    exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])


register(
    Operation(
        name="lamb_step",
        summary="one LAMB step over all parameters of a model, moments in float32",
        inputs=_inputs,
        eager=_eager,
        ours=_ours,
        work=_work,
        shapes=_SHAPES,
        registered="lamb_update",
    )
)


def _by_decay(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors
) -> list[tuple[float, list[Tensors]]]:
    """The lists once for the tensors with weight decay and once for those without: the groups of an optimizer.

    Raises:
        TypeError: the moments have another dtype than the parameters, which these peers don't know.
    """
    if params[0].dtype != exp_avgs[0].dtype:
        raise TypeError(f"no moments in {exp_avgs[0].dtype} for parameters in {params[0].dtype}")
    decays, lists = _decays(params), (params, grads, exp_avgs, exp_avg_sqs)
    return [
        (decay, [[tensor for tensor, own in zip(tensors, decays, strict=True) if own == decay] for tensors in lists])
        for decay in sorted(set(decays))
    ]


@peer("lamb_step", package="timm")
def timm(shape: Shape) -> Function:
    """timm's LAMB, the function behind its optimizer, without the clipping of gradients that it adds by default."""
    from timm.optim.lamb import lamb

    beta1, beta2 = BETAS

    def step(params: Tensors, steps: Tensors, **lists: Tensors) -> Tensors:
        # timm counts the steps on the host. Which one it is changes no cost, so that it stays at the first.
        for decay, (group, grads, exp_avgs, exp_avg_sqs) in _by_decay(params, **lists):
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
        for decay, (group, grads, *moments) in _by_decay(params, **lists):
            tensors = [grads, group, *moments]
            # Bias correction 1, averaged gradients 1, decoupled decay 1; no ratio where there is no decay.
            options = (LR, *BETAS, EPS, STEPS + 1, 1, decay, 1, 1, no_norm, 1.0, False)
            multi_tensor_applier(amp_C.multi_tensor_lamb, overflow, tensors, *options)
        return params

    return step
