"""Rows in 8 bits, for products of integers. For inference: there are no gradients."""

from ..reference import row_quantization as reference
from ._op import define

quantize_rows = define(reference.quantize_rows)
"""`x [..., K]` to codes uint8 `[..., K]` and scales float32 `[...]`: x is `(codes - 128) * scale`, K at least 1."""

dequantize_rows = define(reference.dequantize_rows)
"""`y [..., N]`, `scale [...]`, `bias [N]` or None, to `y * scale + bias` in the dtype of `y`."""
