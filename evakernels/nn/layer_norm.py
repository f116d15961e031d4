"""The norms as modules. Parameters are named as torch's own, so that state dicts are exchanged freely."""

import torch
from torch import Tensor, nn

from evakernels.ops import layer_norm, rms_norm


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension, computed by `evakernels.layer_norm`.

    Args:
        width: size of the last dimension.
        eps: added to the variance; by default as in torch. EVA's norms have 1e-6.
        bias: whether there is a bias beside the weight.
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, eps, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension, computed by `evakernels.rms_norm`.

    Args:
        width: size of the last dimension.
        eps: added to the mean square; None, as in torch: `torch.finfo` of the dtype of the sums, float32 or float64.
    """

    def __init__(
        self,
        width: int,
        eps: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
