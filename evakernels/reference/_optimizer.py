"""Helpers of the optimizers' references."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def updated_moments(
    g: Tensor, m: Tensor, v: Tensor, beta1: float, beta2: float, grad_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`beta1 m + (1 - beta1) g` and `beta2 v + (1 - beta2) g^2`, with `g` divided by the scale; in its dtype."""
    if grad_scale is not None:
        g = g / grad_scale.reshape(())  # shape [1] would broadcast 0-D gradients
    return beta1 * m.to(g.dtype) + (1 - beta1) * g, beta2 * v.to(g.dtype) + (1 - beta2) * g.square()


def bias(beta: float, t: Tensor, like: Tensor) -> Tensor:
    """1 - beta^t, to full precision also for beta close to 1."""
    return -torch.expm1(t.to(like.dtype) * (math.log(beta) if beta > 0 else -math.inf))


def rounded(value: Tensor, i: int, step: Tensor, seeds: Sequence[int], first_elements: Sequence[int]) -> Tensor:
    """The i-th parameter, rounded stochastically to bfloat16 if there are seeds."""
    return round_stochastically(value, seeds[i], step, first_elements[i]) if seeds else value


def write(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Copies `value` into `target` unless found_inf is set."""
    target.copy_(value if found_inf is None else torch.where(found_inf.reshape(()) > 0, target, value))


# --- stochastic rounding --------------------------------------------------------------------------------------------

_WORD = 0xFFFFFFFF


def round_stochastically(value: Tensor, seed: int, step: Tensor, first_element: int) -> Tensor:
    """Rounds to bfloat16 values, in float32: up with the probability of the fraction that is cut off.

    So the mean of many roundings is the value itself (Gupta et al. 2015, arXiv 1502.02551). The random numbers are a
    hash of (seed, step, index of the element in its whole tensor), equal on every device and for every number of
    threads; `csrc/common/stochastic_rounding.h` is the same in C++.
    """
    bits = value.contiguous().view(torch.int32)
    rounded = (_shifted(random_bits(value, seed, step, first_element), 16) + bits) & ~0xFFFF
    return torch.where(value.isnan(), value, rounded.view(torch.float32))


def random_bits(like: Tensor, seed: int, step: Tensor, first_element: int) -> Tensor:
    """32 random bits for each element, int32; they repeat after 2^32 elements."""
    low, high, count = _word(seed), _word(seed >> 32), step.to(torch.int32)
    start = _scrambled(_scrambled(_scrambled(count.new_tensor(low)) + high) + count) + _word(first_element)
    mask = _scrambled(_scrambled(_scrambled(count.new_tensor(_word(high ^ 0x9E3779B9))) + low) + count)
    numbers = torch.arange(like.numel(), device=like.device).to(torch.int32).view(like.shape)
    return _scrambled(_scrambled(numbers + start) ^ mask)


def _scrambled(x: Tensor) -> Tensor:
    """lowbias32 of Chris Wellons's hash-prospector (2018); int32 products wrap like unsigned ones."""
    x = (x ^ _shifted(x, 16)) * 0x7FEB352D
    x = (x ^ _shifted(x, 15)) * _word(0x846CA68B)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """`x >> bits` of the unsigned number with the bits of `x`."""
    return (x >> bits) & (_WORD >> bits)


def _word(number: int) -> int:
    """The int32 with the last 32 bits of `number`."""
    return ((number & _WORD) ^ 0x80000000) - 0x80000000
