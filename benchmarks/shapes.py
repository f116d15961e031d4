"""Shapes by name: a tower of a model at a resolution and a batch size, or numbers alone.

`eva02-l14@224 b256` is the vision tower of EVA02-CLIP-L/14 at 224 pixels with 256 images, `eva02-l14@224 b256 drop50`
the same with half of the patches dropped, `eva02-l14:text b256` the text tower with 256 captions of 77 tokens. Which
numbers `4096x768` are is the operation's to say.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from evaclip.errors import UserError, unknown_name
from evaclip.model.config import CLIPConfig, get_config, list_models

Tower = Literal["vision", "text"]

_NAME = re.compile(r"(?P<model>[\w-]+)(@(?P<pixels>\d+)|(?P<text>:text))? b(?P<batch>\d+)( drop(?P<drop>\d+))?")
_FORM = "expected a name such as 'eva02-l14@224 b256', 'eva02-l14@224 b256 drop50' or 'eva02-l14:text b256'"


@dataclass(frozen=True)
class Shape:
    """The sizes that an op meets in one tower of one model, or sizes alone: those that it has no use for are 1.

    Attributes:
        name: value of `--shape`.
        batch: images or captions.
        tokens: that a block sees: the class token and the patches that remain, or the caption.
        width: channels of a token.
        heads, head_dim: attention heads, and channels of a head.
        hidden: hidden channels of the MLP.
        embed_dim: channels of the features that both towers end in.
        grid: rows and columns of patches before any is dropped; zeros in the text tower.
        kept_patches: patches that remain.
        model: short name of the configuration, such as `eva02-l14`; empty for sizes alone.
        tower: the tower that the tokens, width and heads are of.
        pixels: side of the image; 0 in the text tower.
        drop: percentage of the patches that are dropped.
    """

    name: str = ""
    batch: int = 1
    tokens: int = 1
    width: int = 1
    heads: int = 1
    head_dim: int = 1
    hidden: int = 1
    embed_dim: int = 1
    grid: tuple[int, int] = (0, 0)
    kept_patches: int = 0
    model: str = ""
    tower: Tower = "vision"
    pixels: int = 0
    drop: int = 0

    @property
    def patches(self) -> int:
        """Patches of an image before any is dropped; 0 in the text tower."""
        return self.grid[0] * self.grid[1]

    @property
    def config(self) -> CLIPConfig:
        """The model's configuration. Raises `UserError` for sizes alone."""
        if not self.model:
            raise UserError(f"shape {self.name!r} is that of no model")
        return get_config(short_names()[self.model])


@cache
def short_names() -> dict[str, str]:
    """Configuration names by the short names that shapes use: `eva02-l14` for `EVA02-CLIP-L-14`."""
    names = {name.lower().replace("-clip", ""): name for name in list_models()}
    return {re.sub(r"-([a-z]+)-(\d+)", r"-\1\2", short): name for short, name in names.items()}


def parse_shape(name: str) -> Shape:
    """The shape called `name`; without `@pixels` it is the resolution that the model was trained at.

    Raises:
        UserError: the name has another form, the model is unknown, or the image can't be cut into patches.
    """
    match = _NAME.fullmatch(name.strip())
    if match is None:
        raise UserError(f"unknown shape {name!r}; {_FORM}")
    model = match["model"].lower()
    if model not in short_names():
        raise unknown_name("model", match["model"], short_names())
    drop, batch = int(match["drop"] or 0), int(match["batch"])
    if batch < 1 or drop > 99 or (match["text"] and drop):
        raise UserError(f"shape {name!r} isn't possible: batches start at 1, drop at 0 to 99, and text drops nothing")
    config = get_config(short_names()[model])
    if match["text"]:
        return _text_shape(config, model, batch)
    pixels = int(match["pixels"] or config.vision.image_shape[0])
    if pixels == 0 or pixels % config.vision.patch_size:
        raise UserError(f"shape {name!r}: {pixels} pixels can't be cut into patches of {config.vision.patch_size}")
    return _vision_shape(config, model, pixels, batch, drop)


def _text_shape(config: CLIPConfig, model: str, batch: int) -> Shape:
    text = config.text
    return Shape(
        name=f"{model}:text b{batch}",
        batch=batch,
        tokens=text.context_length,
        width=text.width,
        heads=text.heads,
        head_dim=text.head_dim,
        hidden=text.hidden,
        embed_dim=config.embed_dim,
        model=model,
        tower="text",
    )


def _vision_shape(config: CLIPConfig, model: str, pixels: int, batch: int, drop: int) -> Shape:
    vision = config.vision
    side = pixels // vision.patch_size
    kept = side**2 - side**2 * drop // 100
    return Shape(
        name=f"{model}@{pixels} b{batch}" + (f" drop{drop}" if drop else ""),
        batch=batch,
        tokens=1 + kept,
        width=vision.width,
        heads=vision.heads,
        head_dim=vision.head_dim,
        hidden=vision.hidden,
        embed_dim=config.embed_dim,
        grid=(side, side),
        kept_patches=kept,
        model=model,
        pixels=pixels,
        drop=drop,
    )
