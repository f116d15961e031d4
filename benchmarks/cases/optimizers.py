"""One step of LAMB and of AdamW over all parameters of a model.

Functions of lists of tensors are measured, not optimizer objects: nothing has to be kept between calls. LAMB's variant
is the one of the paper and of apex, `nvlamb`, because other libraries offer it too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import evakernels
from benchmarks.operation import NVIDIA_APEX, Cost, Draw, Function, Inputs, Operation, Work, peer, register
from benchmarks.shapes import Shape, short_names
from evaclip import create_model

LR, BETAS, EPS, WEIGHT_DECAY = 1e-2, (0.9, 0.98), 1e-6, 0.05
STEPS = 10
"""Steps before the measured one."""

Tensors = list[Tensor]


def sizes_of(shape: Shape) -> tuple[torch.Size, ...]:
    """Sizes of all parameters of a model, or of the tensors of a shape of sizes alone."""
    return _sizes_of_model(shape.model) if shape.model else (torch.Size((1, shape.width)),) * shape.batch


@cache
def _sizes_of_model(model: str) -> tuple[torch.Size, ...]:
    parameters = create_model(short_names()[model], device="meta").parameters()
    return tuple(parameter.shape for parameter in parameters)


def _inputs(shape: Shape, draw: Draw) -> Inputs:
    """Parameters and gradients in the measured dtype, moments in float32. Batch and tower don't matter."""
    sizes = sizes_of(shape)
    moments = [[draw.normal(*size, scale=1e-3, dtype=torch.float32) for size in sizes] for _ in range(2)]
    return {
        "params": [draw.normal(*size, scale=0.02) for size in sizes],
        "grads": [draw.normal(*size, scale=1e-3) for size in sizes],
        "exp_avgs": moments[0],
        "exp_avg_sqs": [values.square_() for values in moments[1]],
        "steps": [torch.tensor(float(STEPS), device=draw.device) for _ in sizes],
    }


def _work(shape: Shape, itemsize: int) -> Work:
    """Reads parameter, gradient and two moments, writes parameter and moments: 28 bytes a parameter in float32.

    LAMB needs a tensor's norm before it writes. A tensor larger than the cache is then read twice, with its moments, 40
    bytes in all; the formula counts each input once, as everywhere.
    """
    sizes = sizes_of(shape)
    parameters, steps = sum(size.numel() for size in sizes), len(sizes)
    return Work(Cost(0, parameters * (3 * itemsize + 4 * 4) + steps * 2 * 4))


def _decays_of(params: Sequence[Tensor]) -> list[float]:
    """Weight decay of matrices and embeddings; zero for biases, norms and the temperature."""
    return [WEIGHT_DECAY if param.ndim > 1 else 0.0 for param in params]


def _directions(params: Tensors, *state: Tensors) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Update the moments of one tensor after the other; yield its parameter, Adam's direction, and its decay."""
    for param, grad, exp_avg, exp_avg_sq, step, decay in zip(params, *state, _decays_of(params), strict=True):
        grad = grad.to(exp_avg.dtype)
        step += 1
        exp_avg.lerp_(grad, 1 - BETAS[0])
        exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
        update = exp_avg / (1 - BETAS[0] ** step)
        update /= (exp_avg_sq / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
        yield param, update, decay


def _ours(step: Callable[..., None]) -> Function:
    def run(params: Tensors, **state: Tensors) -> Tensors:
        step(params, **state, lrs=[LR] * len(params), weight_decays=_decays_of(params), betas=BETAS, eps=EPS)
        return params

    return run


def _lamb_eager(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors) -> Tensors:
    """One tensor after the other."""
    for param, update, decay in _directions(params, grads, exp_avgs, exp_avg_sqs, steps):
        if decay:
            weight = param.to(update.dtype)
            update.add_(weight, alpha=decay)
            norm, update_norm = weight.norm(), update.norm()
            update *= torch.where((norm > 0) & (update_norm > 0), norm / update_norm, 1.0)
        param.add_(update, alpha=-LR)
    return params


def _adamw_eager(params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors) -> Tensors:
    """One tensor after the other."""
    for param, update, decay in _directions(params, grads, exp_avgs, exp_avg_sqs, steps):
        param.mul_(1 - LR * decay).add_(update, alpha=-LR)
    return params


_LAMB = register(
    Operation(
        name="lamb_step",
        summary="one LAMB step over all parameters of a model, moments in float32",
        inputs=_inputs,
        eager=_lamb_eager,
        ours=_ours(partial(evakernels.lamb_step, variant="nvlamb")),
        work=_work,
        shapes={"cpu": ("tiny@32 b1",), "cuda": ("eva02-b16@224 b1", "eva02-l14@224 b1", "eva01-g14@224 b1")},
        raw=lambda tensors, elements: Shape(batch=tensors, width=elements),
        small="4x64",
        registered="lamb_update",
    )
)
register(
    replace(
        _LAMB,
        name="adamw_step",
        summary="one AdamW step over all parameters of a model, moments in float32",
        eager=_adamw_eager,
        ours=_ours(evakernels.adamw_update),
        registered="adamw_update",
    )
)


# --- peers ----------------------------------------------------------------------------------------------------------


def _step_by_decay(step: Callable[[float, list[Tensors]], None], advance: bool = False) -> Function:
    """A function of the inputs that calls `step(decay, [params, grads, exp_avgs, exp_avg_sqs, steps])` for the tensors
    with weight decay and for those without: the groups of an optimizer.

    Raises:
        TypeError: the moments have another dtype than the parameters, which these peers don't support.
    """

    def run(**inputs: Tensors) -> Tensors:
        params, moments = inputs["params"], inputs["exp_avgs"]
        if params[0].dtype != moments[0].dtype:
            raise TypeError(f"no moments in {moments[0].dtype} for parameters in {params[0].dtype}")
        if advance:
            torch._foreach_add_(inputs["steps"], 1)
        decays = _decays_of(params)
        for decay in sorted(set(decays)):
            members = [index for index, own in enumerate(decays) if own == decay]
            step(decay, [[tensors[index] for index in members] for tensors in inputs.values()])
        return params

    return run


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

    return _step_by_decay(step)


@peer("adamw_step", "torch fused")
def torch_fused(shape: Shape) -> Function:
    """PyTorch's kernel behind `torch.optim.AdamW(fused=True)`: one call for each weight decay."""

    def step(decay: float, lists: list[Tensors]) -> None:
        params, grads, exp_avgs, exp_avg_sqs, steps = lists
        rates: dict[str, Any] = {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": decay, "eps": EPS}
        torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, [], steps, **rates, amsgrad=False, maximize=False)

    return _step_by_decay(step, advance=True)


def _register_apex(op: str, kernel: str, options: Callable[[float, torch.device], tuple[Any, ...]]) -> None:
    """Register a multi-tensor kernel of NVIDIA apex as a peer, with `options(decay, device)` after the tensors."""

    @peer(op, package="apex", devices=("cuda",), install=NVIDIA_APEX)
    def apex(shape: Shape) -> Function:
        import amp_C
        from apex.multi_tensor_apply import multi_tensor_applier

        def step(decay: float, lists: list[Tensors]) -> None:
            params, grads, *moments, _ = lists
            device = params[0].device
            overflow = torch.zeros(1, dtype=torch.int, device=device)
            function = getattr(amp_C, kernel)
            multi_tensor_applier(function, overflow, [grads, params, *moments], *options(decay, device))

        return _step_by_decay(step)


# The kernel behind `FusedLAMB`, without the gradients' norm that `FusedLAMB` always takes; it overwrites the gradients.
# Bias correction 1, averaged gradients 1, decoupled decay 1; no ratio without decay.
_register_apex(
    "lamb_step",
    "multi_tensor_lamb",
    lambda decay, device: (
        *(LR, *BETAS, EPS, STEPS + 1, 1, decay, 1, 1),
        *(torch.zeros(1, device=device), 1.0, False),
    ),
)
# AdamW 1, bias correction 1.
_register_apex("adamw_step", "multi_tensor_adam", lambda decay, device: (LR, *BETAS, EPS, STEPS + 1, 1, 1, decay))
