"""What the references of the optimizers share."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._stochastic_rounding import round_stochastically


def changed_moments(
    g: Tensor, m: Tensor, v: Tensor, beta1: float, beta2: float, grad_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`beta1 m + (1 - beta1) g` and `beta2 v + (1 - beta2) g^2`, with `g` divided by the scale; in its dtype."""
    if grad_scale is not None:
        g = g / grad_scale.reshape(())  # of shape [1] it would change that of the moments
    return beta1 * m.to(g.dtype) + (1 - beta1) * g, beta2 * v.to(g.dtype) + (1 - beta2) * g.square()


def bias(beta: float, t: Tensor, like: Tensor) -> Tensor:
    """1 - beta^t, to full precision also for beta close to 1."""
    return -torch.expm1(t.to(like.dtype) * (math.log(beta) if beta > 0 else -math.inf))


def rounded(value: Tensor, i: int, step: Tensor, seeds: Sequence[int], first_elements: Sequence[int]) -> Tensor:
    """The i-th parameter as it is to be stored: with seeds rounded stochastically, to bfloat16."""
    return round_stochastically(value, seeds[i], step, first_elements[i]) if seeds else value


def write(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Copies `value` into `target` unless found_inf is set."""
    target.copy_(value if found_inf is None else torch.where(found_inf.reshape(()) > 0, target, value))
