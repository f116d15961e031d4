"""Self-attention with rotary positions as a module, and the rotation tables for it."""

import torch
from torch import Tensor, nn

from ..ops import rope_attention
from ..reference.rope_attention import rotate_rounded
from .layer_norm import LayerNorm
from .linear import Linear


class RotaryAttention(nn.Module):
    """Multi-head self-attention with queries and keys rotated inside `evakernels.rope_attention`.

    Args:
        width: channels of input and output.
        heads: divides `width`.
        num_prefix, interleaved, causal: as for `rope_attention`.
        qkv_bias: whether the packed projection `qkv` has a bias.
        sub_ln: whether there is a LayerNorm `norm` before the output projection `proj` (Wang et al. 2022).
        eps: eps of that norm.

    Raises:
        ValueError: for a width that isn't a multiple of `heads`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        num_prefix: int = 1,
        interleaved: bool = True,
        causal: bool = False,
        qkv_bias: bool = True,
        sub_ln: bool = False,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"RotaryAttention: width must be a multiple of heads = {heads}, got {width}")
        self.heads, self.num_prefix, self.interleaved, self.causal = heads, num_prefix, interleaved, causal
        self.qkv = Linear(width, 3 * width, bias=qkv_bias, device=device, dtype=dtype)
        self.norm = LayerNorm(width, eps, device=device, dtype=dtype) if sub_ln else None
        self.proj = Linear(width, width, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, token_index: Tensor | None = None
    ) -> Tensor:
        """`[B, N, width]` to the same shape; tables and index as for `rope_attention`."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        out = rope_attention(
            q,
            k,
            v,
            cos,
            sin,
            token_index=token_index,
            num_prefix=self.num_prefix,
            causal=self.causal,
            interleaved=self.interleaved,
        ).flatten(2)
        y: Tensor = self.proj(out if self.norm is None else self.norm(out))
        return y

    def extra_repr(self) -> str:
        return f"heads={self.heads}, num_prefix={self.num_prefix}, interleaved={self.interleaved}, causal={self.causal}"


def axial_rope(
    grid_h: int,
    grid_w: int,
    head_dim: int,
    *,
    reference_size: float = 16,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The 2-D rotary embedding of EVA-02 (Fang et al. 2023), as tables for `rope_attention`.

    The patch's row rotates the first half of the pairs, its column the second half. Pair j of a half rotates by
    `position * theta ** (-4 * j / head_dim)`. Positions are scaled to `reference_size`: cell i of n is at
    `i / n * reference_size`, so that the range of angles doesn't depend on the resolution.

    Args:
        grid_h, grid_w: patches along each axis, in row-major order.
        head_dim: a multiple of 4.
        reference_size: grid size of the pre-training, in cells.
        theta: base of the frequencies.

    Returns:
        `(cos, sin)`, float32 `[grid_h * grid_w, head_dim / 2]`: one entry per rotated pair.

    Raises:
        ValueError: for an empty grid, or a head_dim that isn't a multiple of 4.
    """
    if grid_h < 1 or grid_w < 1:
        raise ValueError(f"axial_rope: grid_h and grid_w must be at least 1, got {grid_h} x {grid_w}")
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"axial_rope: head_dim must be a multiple of 4, got {head_dim}")
    # float64, so that the tables don't depend on the device or the default dtype.
    pairs = torch.arange(head_dim // 4, dtype=torch.float64, device=device)
    frequencies = theta ** (-4 * pairs / head_dim)

    def angles(size: int) -> Tensor:
        positions = torch.arange(size, dtype=torch.float64, device=device) * (reference_size / size)
        return positions.unsqueeze(1) * frequencies

    rows, columns = angles(grid_h), angles(grid_w)
    spread = rows.unsqueeze(1).expand(-1, grid_w, -1), columns.unsqueeze(0).expand(grid_h, -1, -1)
    table = torch.cat(spread, -1).flatten(0, 1)
    return table.cos().float(), table.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = True) -> Tensor:
    """Rotate pairs of channels, as `rope_attention` rotates queries and keys.

    Args:
        x: `[..., D]`; it is rotated in at least float32 and rounded to its dtype.
        cos, sin: broadcastable to `[..., D / 2]`, one entry per pair.
        interleaved: pairs are neighbours; otherwise channel i goes with channel i + D / 2.
    """
    return rotate_rounded(x, (cos, sin), interleaved)
