"""The norms as modules, with torch's arguments, defaults and state dicts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import layer_norm, rms_norm


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, computed by `evakernels.layer_norm`.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as for `torch.nn.LayerNorm`.
        out_dtype: dtype of the output, as for `evakernels.layer_norm`; None for the input's.

    Raises:
        ValueError: in `forward`, for an input that doesn't end in `normalized_shape`.
    """

    out_dtype: torch.dtype | None = None  # for modules that were pickled without it

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.out_dtype = out_dtype

    def forward(self, input: Tensor) -> Tensor:
        """`[..., *normalized_shape]` to the same shape; dtypes as in `evakernels.layer_norm`."""
        parameters = self.weight, self.bias
        return over_trailing(self, layer_norm, input, self.normalized_shape, *parameters, out_dtype=self.out_dtype)

    def extra_repr(self) -> str:
        return _extend_repr(super().extra_repr(), self.out_dtype)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, computed by `evakernels.rms_norm`.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as for `torch.nn.RMSNorm`.
        out_dtype: dtype of the output, as for `evakernels.rms_norm`; None for the input's.

    Raises:
        ValueError: in `forward`, for an input that doesn't end in `normalized_shape`.
    """

    out_dtype: torch.dtype | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.out_dtype = out_dtype

    def forward(self, x: Tensor) -> Tensor:
        """`[..., *normalized_shape]` to the same shape; dtypes as in `evakernels.rms_norm`."""
        return over_trailing(self, rms_norm, x, self.normalized_shape, self.weight, out_dtype=self.out_dtype)

    def extra_repr(self) -> str:
        return _extend_repr(super().extra_repr(), self.out_dtype)


def _extend_repr(text: str, out_dtype: torch.dtype | None) -> str:
    return text if out_dtype is None else f"{text}, out_dtype={out_dtype}"


def over_trailing(
    module: nn.Module,
    norm: Callable[..., Tensor],
    x: Tensor,
    shape: Sequence[int],
    *parameters: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A norm with the `eps` of `module` over the trailing dimensions of `x`, of sizes `shape`."""
    first = x.dim() - len(shape)
    if not shape or tuple(x.shape[max(first, 0) :]) != tuple(shape):
        expected = ", ".join(("...", *map(str, shape)))
        raise ValueError(f"{type(module).__name__}: input must have shape [{expected}], got {tuple(x.shape)}")
    if len(shape) == 1:
        return norm(x, *parameters, eps=module.eps, out_dtype=out_dtype)
    flat = (None if parameter is None else parameter.flatten() for parameter in parameters)
    return norm(x.flatten(first), *flat, eps=module.eps, out_dtype=out_dtype).view(x.shape)
