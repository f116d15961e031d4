"""Rotation tables for `evakernels.rope_attention`."""

import torch
from torch import Tensor


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

    The first half of the pairs turns with the patch's row, the second half with its column. Pair j of a half
    turns by `position * theta ** (-4 * j / head_dim)`. Positions are scaled so that a grid of any size spans
    `reference_size` cells: cell i of n lies at `i / n * reference_size`. So a model keeps its angles' range
    when its resolution changes.

    An attention module computes the tables once for its grid, keeps them as non-persistent buffers, shared by
    all layers, and passes them as `rope_attention(q, k, v, cos, sin, num_prefix=1)`.

    Args:
        grid_h, grid_w: patches along each axis; they are numbered row by row.
        head_dim: a multiple of 4.
        reference_size: grid size of the pre-training, in cells; the grid's own size means no scaling.
        theta: base of the frequencies.

    Returns:
        `(cos, sin)`, float32 `[grid_h * grid_w, head_dim / 2]`: one entry per rotated pair.

    Raises:
        ValueError: for an empty grid or a head_dim that isn't a multiple of 4.
    """
    if grid_h < 1 or grid_w < 1:
        raise ValueError(f"axial_rope: the grid is {grid_h} x {grid_w}; accepted: at least 1 x 1")
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"axial_rope: head_dim is {head_dim}; accepted: multiples of 4")
    # float64 up to the last rounding, so that the tables don't depend on the device or the default dtype.
    pairs = torch.arange(head_dim // 4, dtype=torch.float64, device=device)
    frequencies = theta ** (-4 * pairs / head_dim)

    def angles(size: int) -> Tensor:
        positions = torch.arange(size, dtype=torch.float64, device=device) * (reference_size / size)
        return positions.unsqueeze(1) * frequencies

    rows = angles(grid_h).unsqueeze(1).expand(-1, grid_w, -1)
    columns = angles(grid_w).unsqueeze(0).expand(grid_h, -1, -1)
    table = torch.cat((rows, columns), -1).flatten(0, 1)
    return table.cos().float(), table.sin().float()
