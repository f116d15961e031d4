"""Opening image files, and converting pixels that are not bytes."""

import io
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Pillow's names of the formats that are read. None of them starts a program, as EPS does with Ghostscript."""
DEFAULT_MAX_IMAGE_PIXELS = 2**28 // 3
"""Pillow's own limit: 256 MiB of RGB."""
_INTEGER_RANGES = (65535,)
_FLOAT_RANGES = (1, 255, 65535)


class UnknownRangeError(ValueError):
    """Pixels that are not bytes lie in none of the known ranges."""


def open_image(
    data: bytes, max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS, formats: Sequence[str] = FORMATS
) -> ImageFile.ImageFile:
    """Open an image file; the header is read, no pixel is decoded.

    Args:
        data: the file's bytes.
        max_pixels: width times height at most. A larger limit than Pillow's becomes Pillow's, for the whole process.
        formats: accepted formats, of `FORMATS`.

    Raises:
        Image.DecompressionBombError: the image has more pixels.
        UnidentifiedImageError: the file has none of these formats.
    """
    if max_pixels > DEFAULT_MAX_IMAGE_PIXELS and (Image.MAX_IMAGE_PIXELS or max_pixels) < max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels
    image = Image.open(io.BytesIO(data), formats=[name for name in formats if name in _readable()])
    if image.width * image.height > max_pixels:
        raise Image.DecompressionBombError(
            f"width x height must be at most {max_pixels:,} pixels (max_image_pixels), got {image.width} x"
            f" {image.height}"
        )
    return image


@cache
def _readable() -> frozenset[str]:
    """Formats of this build of Pillow: AVIF, for one, is new."""
    return frozenset(Image.registered_extensions().values())


def pixel_kind(image: Image.Image) -> str:
    """'16-bit', 'integer' or 'float' where the pixels are not bytes; '' where they are."""
    if image.mode.startswith("I;16"):
        return "16-bit"
    return {"I": "integer", "F": "float"}.get(image.mode, "")


def eight_bit(image: Image.Image) -> Image.Image:
    """Convert an image with non-byte pixels to grey (mode L, or LA with transparency); return others unchanged.

    Pillow's own conversion cuts such pixels off at 255 instead. Integers are scaled from 0..65535; floats from the
    smallest of 0..1, 0..255 and 0..65535 that holds all of them. Raises UnknownRangeError for other pixels, and NaN.
    """
    kind = pixel_kind(image)
    if not kind:
        return image
    values = np.asarray(image)
    ranges = _FLOAT_RANGES if kind == "float" else _INTEGER_RANGES
    low, high = values.min(), values.max()
    # Of NaN no comparison is true.
    top = next((top for top in ranges if low >= 0 and high <= top), None)
    if top is None:
        accepted = " or ".join(f"0..{top}" for top in ranges)
        raise UnknownRangeError(f"{kind} pixels from {low:g} to {high:g}; accepted: {accepted}")
    scaled = values.astype(np.float32) * np.float32(255 / top)
    gray = Image.fromarray((scaled + np.float32(0.5)).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is None:
        return gray
    alpha = np.where(values == transparent, np.uint8(0), np.uint8(255))
    return Image.merge("LA", (gray, Image.fromarray(alpha)))
