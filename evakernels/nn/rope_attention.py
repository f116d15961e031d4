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
    compact: bool = False,
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
        compact: return the angles of the rows and those of the columns rather than those of every patch, a table
            that a GPU keeps in its smallest cache. The grid must be square.

    Returns:
        `(cos, sin)`, float32 `[grid_h * grid_w, head_dim / 2]`: one entry per rotated pair. If `compact`:
        `[2, grid_h, head_dim / 4]`.

    Raises:
        ValueError: for an empty grid, a head_dim that isn't a multiple of 4, or a compact table of a grid that isn't
            square.
    """
    if grid_h < 1 or grid_w < 1:
        raise ValueError(f"axial_rope: the grid is {grid_h} x {grid_w}; accepted: at least 1 x 1")
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"axial_rope: head_dim is {head_dim}; accepted: multiples of 4")
    if compact and grid_h != grid_w:
        raise ValueError(f"axial_rope: the grid is {grid_h} x {grid_w}; a compact table takes a square one")
    # float64 up to the last rounding, so that the tables don't depend on the device or the default dtype.
    pairs = torch.arange(head_dim // 4, dtype=torch.float64, device=device)
    frequencies = theta ** (-4 * pairs / head_dim)

    def angles(size: int) -> Tensor:
        positions = torch.arange(size, dtype=torch.float64, device=device) * (reference_size / size)
        return positions.unsqueeze(1) * frequencies

    rows, columns = angles(grid_h), angles(grid_w)
    if compact:
        table = torch.stack((rows, columns))
    else:
        spread = rows.unsqueeze(1).expand(-1, grid_w, -1), columns.unsqueeze(0).expand(grid_h, -1, -1)
        table = torch.cat(spread, -1).flatten(0, 1)
    return table.cos().float(), table.sin().float()
