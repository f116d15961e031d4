"""Shapes named after what they are: a tower of a model at a resolution and a batch size.

`eva02-l14@224 b256` is the vision tower of EVA02-CLIP-L/14 at 224 pixels with 256 images, `eva02-l14@224 b256 drop50`
the same with half of the patches dropped, `eva02-l14:text b256` the text tower with 256 captions of 77 tokens.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from evaclip.errors import UserError, unknown_name
from evaclip.model.config import CLIPConfig, TextConfig, VisionConfig, get_config, list_models

Tower = Literal["vision", "text"]

_NAME = re.compile(r"(?P<model>[\w-]+)(@(?P<pixels>\d+)|(?P<text>:text))? b(?P<batch>\d+)( drop(?P<drop>\d+))?")
_FORM = "expected a name such as 'eva02-l14@224 b256', 'eva02-l14@224 b256 drop50' or 'eva02-l14:text b256'"


@dataclass(frozen=True)
class Shape:
    """The sizes that an op meets in one tower of one model.

    Attributes:
        model: short name of the configuration, such as `eva02-l14`.
        tower: whose tokens, width and heads are meant.
        pixels: side of the image; 0 in the text tower.
        batch: images or captions.
        drop: percentage of the patches that are dropped.
    """

    model: str
    tower: Tower
    pixels: int
    batch: int
    drop: int = 0

    @property
    def name(self) -> str:
        """The name that `parse_shape` reads."""
        where = ":text" if self.tower == "text" else f"@{self.pixels}"
        return f"{self.model}{where} b{self.batch}" + (f" drop{self.drop}" if self.drop else "")

    @property
    def config(self) -> CLIPConfig:
        """The model's configuration."""
        return get_config(short_names()[self.model])

    @property
    def tower_config(self) -> VisionConfig | TextConfig:
        """The configuration of the tower, at its trained resolution."""
        return self.config.vision if self.tower == "vision" else self.config.text

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.pixels // self.config.vision.patch_size

    @property
    def patches(self) -> int:
        """Patches of an image before any is dropped; 0 in the text tower."""
        return self.grid**2

    @property
    def kept_patches(self) -> int:
        """Patches that remain."""
        return self.patches - self.patches * self.drop // 100

    @property
    def tokens(self) -> int:
        """Tokens that a block sees: the class token and the patches that remain, or the caption."""
        return self.config.text.context_length if self.tower == "text" else 1 + self.kept_patches

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.tower_config.width

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.tower_config.heads

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.tower_config.head_dim

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP."""
        return self.tower_config.hidden

    def with_batch(self, batch: int) -> "Shape":
        """The same shape at another batch size."""
        return replace(self, batch=batch)


@cache
def short_names() -> dict[str, str]:
    """Configuration names by the short names that shapes use: `eva02-l14` for `EVA02-CLIP-L-14`."""
    return {_shorten(name): name for name in list_models()}


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
    if match["text"]:
        return Shape(model, "text", 0, batch)
    vision = get_config(short_names()[model]).vision
    pixels = int(match["pixels"] or vision.image_shape[0])
    if pixels == 0 or pixels % vision.patch_size:
        raise UserError(f"shape {name!r}: {pixels} pixels can't be cut into patches of {vision.patch_size}")
    return Shape(model, "vision", pixels, batch, drop)


def _shorten(name: str) -> str:
    return re.sub(r"-([a-z]+)-(\d+)", r"-\1\2", name.lower().replace("-clip", ""))
