"""Tensors and peers of the steps of all optimizers.

Functions of lists of tensors are measured, not optimizer objects, so that nothing has to be kept between calls.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

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


def draw_inputs(shape: Shape, draw: Draw) -> Inputs:
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


def register_step(name: str, algorithm: str, registered: str, eager: Function, ours: Function) -> None:
    """Registers the step of an optimizer, by functions that return the parameters."""
    register(
        Operation(
            name=name,
            summary=f"one {algorithm} step over all parameters of a model, moments in float32",
            inputs=draw_inputs,
            eager=eager,
            ours=ours,
            work=_work,
            shapes={"cpu": ("tiny@32 b1",), "cuda": ("eva02-b16@224 b1", "eva02-l14@224 b1", "eva01-g14@224 b1")},
            raw=lambda tensors, elements: Shape(batch=tensors, width=elements),
            small="4x64",
            registered=registered,
        )
    )


def decays_of(params: Sequence[Tensor]) -> list[float]:
    """Weight decay of matrices and embeddings; zero for biases, norms and the temperature."""
    return [WEIGHT_DECAY if param.ndim > 1 else 0.0 for param in params]


def directions(params: Tensors, *state: Tensors) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Update the moments of one tensor after the other; yield its parameter, Adam's direction, and its decay."""
    for param, grad, exp_avg, exp_avg_sq, step, decay in zip(params, *state, decays_of(params), strict=True):
        grad = grad.to(exp_avg.dtype)
        step += 1
        exp_avg.lerp_(grad, 1 - BETAS[0])
        exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
        update = exp_avg / (1 - BETAS[0] ** step)
        update /= (exp_avg_sq / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
        yield param, update, decay


def step_by_decay(step: Callable[[float, list[Tensors]], None], advance: bool = False) -> Function:
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
        decays = decays_of(params)
        for decay in sorted(set(decays)):
            members = [index for index, own in enumerate(decays) if own == decay]
            step(decay, [[tensors[index] for index in members] for tensors in inputs.values()])
        return params

    return run


def register_apex(op: str, kernel: str, options: Callable[[float, torch.device], tuple[Any, ...]]) -> None:
    """Registers a multi-tensor kernel of NVIDIA apex as a peer, with `options(decay, device)` after the tensors."""

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

        return step_by_decay(step)
