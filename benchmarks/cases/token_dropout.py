"""Token dropout at the entrance of a vision tower."""

import torch
from torch import Tensor

import evakernels
from benchmarks.cases._inputs import kept_patches
from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, Work, peer, register
from benchmarks.shapes import Shape
from evaclip.errors import UserError

_SHAPES = {
    "cpu": ("eva02-b16@224 b1 drop50", "eva02-b16@224 b8 drop50", "eva02-l14@336 b8 drop50"),
    "cuda": (
        "eva02-b16@224 b64 drop50",
        "eva02-b16@224 b512",
        "eva02-b16@224 b512 drop50",
        "eva02-l14@224 b256 drop50",
        "eva02-l14@336 b128 drop50",
        "eva02-bige14@224 b128 drop50",
    ),
}


def _raw(images: int, patches: int, kept: int, channels: int) -> Shape:
    if kept > patches:
        raise UserError(f"token_dropout can't keep {kept} of {patches} patches")
    return Shape(batch=images, tokens=1 + kept, width=channels, grid=(1, patches), kept_patches=kept)


def _inputs(shape: Shape, draw: Draw) -> Inputs:
    token_index = kept_patches("token_dropout", shape, draw)
    return {
        "patches": draw.normal(shape.batch, shape.patches, shape.width),
        "token_index": token_index,
        "prefix": draw.normal(1, shape.width),
        "pos_embed": draw.normal(1 + shape.patches, shape.width),
    }


def _work(shape: Shape, itemsize: int) -> Work:
    """Forward reads the kept patches; backward also writes zeros for the others. Indices are too small to count."""
    row = shape.width * itemsize
    kept, parameters = shape.batch * shape.kept_patches * row, (2 + shape.patches) * row
    tokens = shape.batch * shape.tokens * row
    forward = Cost(0, kept + parameters + tokens)
    return Work(forward, Cost(0, tokens + shape.batch * shape.patches * row + parameters))


def _eager(patches: Tensor, token_index: Tensor | None, prefix: Tensor, pos_embed: Tensor) -> Tensor:
    tokens = patches + pos_embed[1:]
    if token_index is not None:
        tokens = tokens.gather(1, token_index.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    return torch.cat(((prefix + pos_embed[:1]).expand(patches.shape[0], -1, -1), tokens), 1)


register(
    Operation(
        name="token_dropout",
        summary="the patches that are kept, plus their positions, behind the class token",
        inputs=_inputs,
        eager=_eager,
        ours=evakernels.token_dropout,
        work=_work,
        shapes=_SHAPES,
        raw=_raw,
        small="1x4x2x64",
        gradients=("patches", "prefix", "pos_embed"),
        registered="token_dropout_forward",
    )
)


@peer("token_dropout", "torch indexing")
def indexing(shape: Shape) -> Function:
    """Advanced indexing instead of a gather, behind class token and positions, as in open_clip's PatchDropout."""

    def drop(patches: Tensor, token_index: Tensor | None, prefix: Tensor, pos_embed: Tensor) -> Tensor:
        batch = patches.shape[0]
        tokens = torch.cat((prefix.expand(batch, -1, -1), patches), 1) + pos_embed
        if token_index is None:
            return tokens
        rows = torch.arange(batch, device=patches.device).unsqueeze(1)
        return torch.cat((tokens[:, :1], tokens[:, 1:][rows, token_index]), 1)

    return drop
