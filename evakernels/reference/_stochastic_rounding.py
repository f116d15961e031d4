"""Stochastic rounding to bfloat16: up with the probability of the part that is cut off.

So the mean of many roundings is the value itself, and steps smaller than half a unit add up (Gupta et al. 2015, arXiv
1502.02551). The random numbers are a hash of (seed, step, number of the element in its tensor), the same on every
device and for every number of threads; `csrc/common/stochastic_rounding.h` is the same in C++.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def round_stochastically(value: Tensor, seed: int, step: Tensor, first_element: int) -> Tensor:
    """A float32 tensor with the values that bfloat16 has.

    Args:
        step: its number, on the device of `value`; nothing waits for it.
        first_element: number of `value`'s first element within its whole tensor.
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
