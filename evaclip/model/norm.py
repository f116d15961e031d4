"""Norms: alone, after a residual add, or inside the residual branch; and the residual stream."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from evaclip.model.config import NormKind
from evakernels import (
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    layer_norm_add,
    rms_norm,
    rms_norm_add,
)
from evakernels.autocast import is_on


def product_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype if autocast would cast a float32 `x` in a matmul; else None."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if x.dtype == torch.float32 and is_on(device) else None


class Norm(nn.Module):
    """LayerNorm, or RMSNorm (which has no bias), over the last dimension of `[..., width]`.

    The residual forms take `layer_scale` `[width]` and `row_scale` `[B]`, factors of the branch. `out_dtype` is the
    dtype of `norm(x)`, None for the dtype of `x`; `product_dtype` before matmuls saves a float32 copy.
    """

    bias: nn.Parameter | None

    def __init__(self, width: int, kind: NormKind = "layer_norm", eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.rms = kind == "rms_norm"
        self.weight = nn.Parameter(torch.ones(width))
        self.register_parameter("bias", None if self.rms else nn.Parameter(torch.zeros(width)))

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """`norm(x)`."""
        if self.rms:
            return rms_norm(x, self.weight, self.eps, out_dtype=out_dtype)
        return layer_norm(x, self.weight, self.bias, self.eps, out_dtype=out_dtype)

    def of_sum(
        self,
        residual: Tensor,
        branch: Tensor,
        layer_scale: Tensor | None = None,
        row_scale: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`(norm(x), x)`, `x = residual + row_scale * layer_scale * branch`, in one pass (pre-norm)."""
        scales = {"layer_scale": layer_scale, "row_scale": row_scale}
        if self.rms:
            return add_rms_norm(residual, branch, self.weight, eps=self.eps, out_dtype=out_dtype, **scales)
        return add_layer_norm(residual, branch, self.weight, self.bias, eps=self.eps, out_dtype=out_dtype, **scales)

    def of_branch(
        self,
        residual: Tensor,
        branch: Tensor,
        layer_scale: Tensor | None = None,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """`residual + row_scale * layer_scale * norm(branch)`, in one pass (post-norm)."""
        scales = {"layer_scale": layer_scale, "row_scale": row_scale}
        if self.rms:
            return rms_norm_add(residual, branch, self.weight, eps=self.eps, **scales)
        return layer_norm_add(residual, branch, self.weight, self.bias, eps=self.eps, **scales)


class Stream(NamedTuple):
    """The residual stream between two blocks; the next norm adds the last branch.

    Attributes:
        x: `[..., width]`.
        branch: of the shape of `x`, still to be added; None for none.
        layer_scale: `[width]`, factors of the branch; None for none.
        row_scale: `[B]`, factors of the branch per sample, or per row of packed samples; None for none.
    """

    x: Tensor
    branch: Tensor | None = None
    layer_scale: Tensor | None = None
    row_scale: Tensor | None = None

    def total(self) -> Tensor:
        """`x` plus the scaled branch."""
        branch = self.branch
        if branch is None:
            return self.x
        if self.layer_scale is not None:
            branch = branch * self.layer_scale
        if self.row_scale is not None:
            branch = branch * self.row_scale.view(-1, *[1] * (branch.dim() - 1))
        return self.x + branch

    def read(self, norm: Norm, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """`(norm(total), total)`; `out_dtype` as in `Norm`."""
        if self.branch is None:
            return norm(self.x, out_dtype), self.x
        return norm.of_sum(self.x, self.branch, self.layer_scale, self.row_scale, out_dtype)
