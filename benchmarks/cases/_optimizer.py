"""What the steps of all optimizers have in common: their tensors, and what is done to the moments."""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, Work, register
from benchmarks.shapes import Shape, short_names
from evaclip import create_model

LR, BETAS, EPS, WEIGHT_DECAY = 1e-2, (0.9, 0.98), 1e-6, 0.05
STEPS = 10
"""Steps made before the one that is measured."""

Tensors = list[Tensor]

SHAPES = {"cpu": ("tiny@32 b1",), "cuda": ("eva02-b16@224 b1", "eva02-l14@224 b1", "eva01-g14@224 b1")}


def raw(tensors: int, elements: int) -> Shape:
    """As many tensors of one row: they are the batch, and the row is a token."""
    return Shape(batch=tensors, width=elements)


def sizes_of(shape: Shape) -> tuple[torch.Size, ...]:
    """Of all parameters of a model, or of the tensors of a shape of sizes alone."""
    return _sizes_of_model(shape.model) if shape.model else (torch.Size((1, shape.width)),) * shape.batch


@cache
def _sizes_of_model(model: str) -> tuple[torch.Size, ...]:
    parameters = create_model(short_names()[model], device="meta").parameters()
    return tuple(parameter.shape for parameter in parameters)


def draw_inputs(shape: Shape, draw: Draw) -> Inputs:
    """Parameters and gradients in the dtype measured, moments in float32. Batch and tower don't matter."""
    sizes = sizes_of(shape)
    moments = [[draw.normal(*size, scale=1e-3, dtype=torch.float32) for size in sizes] for _ in range(2)]
    return {
        "params": [draw.normal(*size, scale=0.02) for size in sizes],
        "grads": [draw.normal(*size, scale=1e-3) for size in sizes],
        "exp_avgs": moments[0],
        "exp_avg_sqs": [values.square_() for values in moments[1]],
        "steps": [torch.tensor(float(STEPS), device=draw.device) for _ in sizes],
    }


def register_step(name: str, algorithm: str, registered: str, eager: Function, ours: Function) -> None:
    """Registers the step of an optimizer, by functions that return the parameters."""
    register(
        Operation(
            name=name,
            summary=f"one {algorithm} step over all parameters of a model, moments in float32",
            inputs=draw_inputs,
            eager=eager,
            ours=ours,
            work=work_of,
            shapes=SHAPES,
            raw=raw,
            small="4x64",
            registered=registered,
        )
    )


def decays_of(params: Sequence[Tensor]) -> list[float]:
    """Matrices and embeddings are decayed; biases, the factors of norms and the temperature are not."""
    return [WEIGHT_DECAY if param.ndim > 1 else 0.0 for param in params]


def work_of(shape: Shape, itemsize: int) -> Work:
    """Reads parameter, gradient and two moments, writes parameter and moments: 28 bytes a parameter in float32.

    LAMB must know a tensor's norm before any of it is written. Where a tensor is larger than the cache, its moments and
    itself are read from memory twice for that, 40 bytes in all; the formula counts each input once, as everywhere.
    """
    sizes = sizes_of(shape)
    parameters, steps = sum(size.numel() for size in sizes), len(sizes)
    return Work(Cost(0, parameters * (3 * itemsize + 4 * 4) + steps * 2 * 4))


def directions(params: Tensors, *state: Tensors) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Takes the moments of one tensor after the other on: its parameter, Adam's direction, and its decay."""
    for param, grad, exp_avg, exp_avg_sq, step, decay in zip(params, *state, decays_of(params), strict=True):
        grad = grad.to(exp_avg.dtype)
        step += 1
        exp_avg.lerp_(grad, 1 - BETAS[0])
        exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
        update = exp_avg / (1 - BETAS[0] ** step)
        update /= (exp_avg_sq / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
        yield param, update, decay


def by_decay(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors
) -> list[tuple[float, list[Tensors]]]:
    """The lists once for the tensors with weight decay and once for those without: the groups of an optimizer.

    Raises:
        TypeError: the moments have another dtype than the parameters, which these peers don't know.
    """
    if params[0].dtype != exp_avgs[0].dtype:
        raise TypeError(f"no moments in {exp_avgs[0].dtype} for parameters in {params[0].dtype}")
    decays, lists = decays_of(params), (params, grads, exp_avgs, exp_avg_sqs)
    return [
        (decay, [[tensor for tensor, own in zip(tensors, decays, strict=True) if own == decay] for tensors in lists])
        for decay in sorted(set(decays))
    ]
