"""Rows in 8 bits, one scale per row, and dequantization of a matmul's result.

    scale = max |x| / 127, codes = round(x / scale) + 128
    (codes - 128) @ w * scale + bias

The zero of the codes is 128, as processors multiply unsigned by signed bytes. The scale is 0 if the largest number of a
row is below 4e-37, and NaN if it isn't finite, so that results are NaN, too.
"""

import torch
from torch import Tensor

from . import accumulation_dtype

LARGEST, ZERO = 127, 128
_MOST = 3.0e38


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    values = x.to(accumulation_dtype(x))
    bound = values.abs().amax(-1)
    inverse = LARGEST / bound
    usable = inverse <= _MOST
    factor = torch.where(usable, inverse, 0.0).unsqueeze(-1)
    codes = ((values * factor).nan_to_num(0.0, 0.0, 0.0).round() + ZERO).to(torch.uint8)
    scale = torch.where(usable, bound / LARGEST, 0.0)
    return codes, torch.where(bound.isfinite(), scale, torch.nan).float()


def dequantize_rows(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    out = y.to(accumulation_dtype(y)) * scale.unsqueeze(-1)
    return (out if bias is None else out + bias).to(y.dtype)
