"""Inputs of several operations: captions, photographs, and the patches that token dropout keeps."""

from functools import cache
from pathlib import Path

from PIL import Image
from torch import Tensor

import evakernels
from benchmarks.operation import Draw
from benchmarks.shapes import Shape
from evaclip.errors import UserError
from evaclip.tokenizer import Tokenizer

CAPTIONS = (Path(__file__).parents[1] / "captions.txt").read_text().splitlines()
"""Real captions of photographs."""


@cache
def captions(context_length: int) -> Tensor:
    """Token ids int64 `[captions, context_length]` of real captions: most of a row is padding."""
    return Tokenizer(context_length)(CAPTIONS)


@cache
def photographs(pixels: int) -> list[Image.Image]:
    """Eight squares with sides of `pixels`: the corners of both photographs of scikit-learn."""
    from sklearn.datasets import load_sample_images

    found = []
    for image in map(Image.fromarray, load_sample_images().images):
        side = image.height * 2 // 3
        for left in (0, image.width - side):
            for top in (0, image.height - side):
                square = image.crop((left, top, left + side, top + side))
                found.append(square.resize((pixels, pixels), Image.Resampling.BICUBIC))
    return found


def kept_patches(op: str, shape: Shape, draw: Draw) -> Tensor | None:
    """The remaining patches of each image, int64 `[B, K]` in the order of the grid; None for all.

    Raises:
        UserError: the shape is one of a text tower.
    """
    if shape.tower != "vision":
        raise UserError(f"{op} works on patches, and {shape.name!r} has none; expected a vision shape")
    if shape.kept_patches == shape.patches:
        return None
    return evakernels.sample_token_index(
        shape.batch, shape.patches, shape.kept_patches, generator=draw.generator, device=draw.device
    )
