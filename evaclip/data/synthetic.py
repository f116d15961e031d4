"""Drawn images with captions, for trials without a data set."""

import io
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from evaclip.data.order import mix
from evaclip.data.samples import RawSample
from evaclip.data.source import Source, hash_list
from evaclip.errors import UserError

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 180),
    "orange": (245, 140, 30),
    "black": (20, 20, 20),
    "pink": (245, 150, 190),
}
SIDES = {"triangle": 3, "square": 4, "pentagon": 5, "circle": 60}
GROUNDS = {"white": (250, 250, 250), "grey": (150, 150, 150)}
_IMAGE_SIZE = 64


class SyntheticSource(Source):
    """`num_samples` images such as "a red circle on white", each a pure function of its index.

    Place, size and rotation vary from sample to sample; the classes follow one another in a fixed cycle, so
    a few hundred samples hold all of them.
    """

    def __init__(self, num_samples: int) -> None:
        if num_samples < 1:
            raise UserError(f"num_samples must be 1 or more, got {num_samples}")
        self._kinds = list(product(COLOURS, SIDES, GROUNDS))
        self.classes = [_caption(*kind) for kind in self._kinds]
        self.description = f"{num_samples} synthetic samples"
        self.shard_sizes = [num_samples]
        self.fingerprint = hash_list("synthetic", [(name, num_samples) for name in self.classes])

    def __getitem__(self, index: int) -> RawSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        kind = self._kinds[index % len(self._kinds)]
        buffer = io.BytesIO()
        _draw(*kind, seed=index).save(buffer, "png", compress_level=1)
        return RawSample(self.name(index), buffer.getvalue(), (_caption(*kind),))

    def label(self, index: int) -> int:
        return index % len(self._kinds)

    def name(self, index: int) -> str:
        return f"synthetic-{index:08d}"


def _caption(colour: str, shape: str, ground: str) -> str:
    return f"a{'n' if colour[0] in 'aeiou' else ''} {colour} {shape} on {ground}"


def _draw(colour: str, shape: str, ground: str, seed: int) -> Image.Image:
    x, y, radius, turn = mix(seed, np.arange(4)).astype(np.float64) / 2**64
    size = _IMAGE_SIZE
    radius = size * (0.2 + 0.15 * radius)
    x, y = (radius + place * (size - 2 * radius) for place in (x, y))
    image = Image.new("RGB", (size, size), GROUNDS[ground])
    circle = (x, y, radius)
    ImageDraw.Draw(image).regular_polygon(circle, SIDES[shape], rotation=turn * 360, fill=COLOURS[colour])
    return image
