"""Augmentation of drawings: random backgrounds and dark contours."""

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageFilter

from evaclip.transforms import WHITE, Color, TrainTransform

_COLOURED = 0.3
_OUTLINED = 0.5
_LEAST_STRENGTH = 0.5
_GAIN = 4


@dataclass(frozen=True)
class DrawingTransform(TrainTransform):
    """Some drawings get a random background colour, some get dark contours as in another style."""

    def background(self, draws: Iterator[float]) -> Color:
        if next(draws) >= _COLOURED:
            return WHITE
        red, green, blue = (int(256 * next(draws)) for _ in range(3))
        return red, green, blue

    def recolored(self, image: Image.Image, draws: Iterator[float]) -> Image.Image:
        image = super().recolored(image, draws)
        if next(draws) >= _OUTLINED:
            return image
        return outlined(image, _LEAST_STRENGTH + (1 - _LEAST_STRENGTH) * next(draws))


def outlined(image: Image.Image, strength: float) -> Image.Image:
    """Darkens an RGB image where its brightness differs from its neighbourhood; 1 is the full strength."""
    gray = image.convert("L")
    edges = ImageChops.difference(gray, gray.filter(ImageFilter.BoxBlur(1)))
    edges = Image.blend(Image.new("L", image.size), edges, strength * _GAIN)
    return ImageChops.subtract(image, edges.convert("RGB"))
