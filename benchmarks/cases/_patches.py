"""What operations on the patches of an image share."""

from torch import Tensor

import evakernels
from benchmarks.operation import Draw
from benchmarks.shapes import Shape
from evaclip.errors import UserError


def kept_patches(op: str, shape: Shape, draw: Draw) -> Tensor | None:
    """Which patches of each image remain, int64 `[B, K]` in the order of the grid; None where all do.

    Raises:
        UserError: the shape is that of a text tower.
    """
    if shape.tower != "vision":
        raise UserError(f"{op} works on patches, and {shape.name!r} has none; expected a vision shape")
    if shape.kept_patches == shape.patches:
        return None
    return evakernels.sample_token_index(
        shape.batch, shape.patches, shape.kept_patches, generator=draw.generator, device=draw.device
    )
