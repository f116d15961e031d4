"""Shapes by name: a tower of a model at a resolution and a batch size, or numbers alone.

`eva02-l14@224 b256` is the vision tower of EVA02-CLIP-L/14 at 224 pixels with 256 images, `eva02-l14@224 b256 drop50`
drops half of the patches, `eva02-l14:text b256` is the text tower with 256 captions of 77 tokens. The meaning of the
numbers in `4096x768` depends on the operation.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from evaclip.errors import UserError, unknown_name
from evaclip.model.config import CLIPConfig, TextConfig, VisionConfig, get_config, list_models

Tower = Literal["vision", "text"]

_NAME = re.compile(r"(?P<model>[\w-]+)(@(?P<pixels>\d+)|(?P<text>:text))? b(?P<batch>\d+)( drop(?P<drop>\d+))?")
_FORM = "expected a name such as 'eva02-l14@224 b256', 'eva02-l14@224 b256 drop50' or 'eva02-l14:text b256'"


@dataclass(frozen=True)
class Shape:
    """The sizes of an op in one tower of one model, or sizes alone. Sizes that the op doesn't use are 1.

    Attributes:
        name: value of `--shape`.
        batch: images or captions.
        tokens: tokens of a block: the class token and the remaining patches, or the caption.
        width: channels of a token.
        heads, head_dim: attention heads, and channels of a head.
        hidden: hidden channels of the MLP.
        embed_dim: channels of the features.
        grid: rows and columns of patches before token dropout; zeros in the text tower.
        kept_patches: patches after token dropout.
        model: short name of the configuration, such as `eva02-l14`; empty for sizes alone.
        tower: tower of tokens, width and heads.
        pixels: side of the image; 0 in the text tower.
        drop: percentage of dropped patches.
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
        """Patches of an image before token dropout; 0 in the text tower."""
        return self.grid[0] * self.grid[1]

    @property
    def config(self) -> CLIPConfig:
        """The model's configuration. Raises `UserError` for sizes alone."""
        if not self.model:
            raise UserError(f"shape must name a model, got {self.name!r}")
        return get_config(short_names()[self.model])


@cache
def short_names() -> dict[str, str]:
    """Configuration names by the short names of shapes: `eva02-l14` for `EVA02-CLIP-L-14`."""
    names = {name.lower().replace("-clip", ""): name for name in list_models()}
    return {re.sub(r"-([a-z]+)-(\d+)", r"-\1\2", short): name for short, name in names.items()}


def parse_shape(name: str) -> Shape:
    """The shape called `name`; without `@pixels` at the resolution of the model's training.

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
    tower: TextConfig | VisionConfig = config.text if match["text"] else config.vision
    sizes: dict[str, Any] = {key: getattr(tower, key) for key in ("width", "heads", "head_dim", "hidden")}
    sizes |= {"batch": batch, "embed_dim": config.embed_dim, "model": model}
    if match["text"]:
        return Shape(f"{model}:text b{batch}", tokens=config.text.context_length, tower="text", **sizes)
    pixels = int(match["pixels"] or config.vision.image_shape[0])
    if pixels == 0 or pixels % config.vision.patch_size:
        raise UserError(f"shape {name!r}: {pixels} pixels can't be cut into patches of {config.vision.patch_size}")
    side = pixels // config.vision.patch_size
    sizes |= {"grid": (side, side), "kept_patches": side**2 - side**2 * drop // 100, "pixels": pixels, "drop": drop}
    full_name = f"{model}@{pixels} b{batch}" + (f" drop{drop}" if drop else "")
    return Shape(full_name, tokens=1 + sizes["kept_patches"], **sizes)
