"""Resize of images with the bits of Pillow's."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import names
from ..reference import resize as reference
from . import _check
from ._op import define

try:
    from PIL import __version__ as _pillow
except ImportError:
    _pillow = "13.0"

_OP = "resize"
_PILLOW = tuple(map(int, _pillow.split(".")[:2]))
MODES = {"L": 1, "RGB": 3, "LA": 2, "RGBA": 4}
"""Channels by the modes of PIL images."""
_BAND = 1 << 18
"""Pixels of a part of a large PIL image that is copied at once."""

_Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def resize(
    image: Any,
    size: Sequence[int],
    box: Sequence[float] | None = None,
    filter: str = "bicubic",
    *,
    crop: Sequence[int] | None = None,
    mirrored: bool = False,
    channels_first: bool = True,
    table: Tensor | None = None,
) -> Tensor:
    """An image of 8 bits, resized with the bits of `PIL.Image.resize`, and with its table of values in one pass.

    Runs on one thread, and without Python's lock, so several images may be resized at once. There is no gradient.

    Args:
        image: uint8 `[H, W, C]` with 1 to 4 channels, a tensor or an array; or a PIL image of mode L, LA, RGB or RGBA,
            which Pillow 13 and later share without a copy. The last of 2 or 4 channels is alpha: the result is that
            of the colours multiplied by it.
        size: `(height, width)` of the result.
        box: part of the image that becomes the result: left, top, right and bottom in pixels or fractions of them.
            None: all of it.
        filter: `"box"`, `"bilinear"`, `"hamming"`, `"bicubic"` or `"lanczos"`.
        crop: part of the result that is computed: top, left, height and width. None: all of it.
        mirrored: flip the result, or the part of it, from left to right.
        channels_first: False for a result `[h, w, C]`.
        table: `[C, 256]`, float32, bfloat16 or float16: the values of the levels, such as those of `level_table`. None
            for the levels, uint8.

    Returns:
        `[C, h, w]`, contiguous.

    Raises:
        TypeError: for another dtype, another kind of image or a mode of more or less than 8 bits.
        ValueError: for an empty image or size, or a box or crop that isn't in the image or the result.

    Examples:
        >>> image = torch.randint(256, (427, 640, 3), dtype=torch.uint8)
        >>> evakernels.image.resize(image, (224, 336), crop=(0, 56, 224, 224)).shape
        torch.Size([3, 224, 224])
    """
    if filter not in reference.FILTERS:
        raise ValueError(names.unknown(f"{_OP}: filter", filter, reference.FILTERS))
    source, index = pixels(image), list(reference.FILTERS).index(filter)
    height, width, channels = source.shape if source.dim() == 3 else (0, 0, 0)
    down_first = len(size) == 2 and _is_down_first(height, width, *size)
    has_alpha = channels in (2, 4)
    out: Tensor = _resize(
        source, size, box or (), crop or (), index, down_first, has_alpha, mirrored, channels_first, table
    )
    return out


def _is_down_first(height: int, width: int, out_height: int, out_width: int) -> bool:
    """Whether this version of Pillow, or 13 without one, resizes down before across."""
    if _PILLOW >= (13, 0):
        return height - out_height > max(0, 2 * (width - out_width))
    return _PILLOW >= (12, 2) and height > 100 * width and out_height < height


def level_table(mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """`[C, 256]`: the levels as torchvision's `ToTensor` and `Normalize` convert them, `(level / 255 - mean) / std`."""
    levels = torch.arange(256, dtype=torch.float32).div(255).expand(len(mean), 256)
    columns = [torch.tensor(values, dtype=torch.float32).unsqueeze(1) for values in (mean, std)]
    return ((levels - columns[0]) / columns[1]).to(dtype)


def _check_call(
    image: Tensor,
    size: Sequence[int],
    box: Sequence[float],
    crop: Sequence[int],
    filter: int,
    down_first: bool,
    has_alpha: bool,
    is_mirrored: bool,
    channels_first: bool,
    table: Tensor | None,
) -> Any:
    _check.of_dtype(_OP, (torch.uint8,), image=image)
    if image.dim() != 3 or not 1 <= image.shape[2] <= 4 or 0 in image.shape:
        raise ValueError(f"{_OP}: image must have shape [H, W, 1 to 4] with H, W > 0, got {tuple(image.shape)}")
    height, width, channels = image.shape
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{_OP}: size must be a height and a width of 1 or more, got {tuple(size)}")
    if box and not (len(box) == 4 and 0 <= box[0] <= box[2] <= width and 0 <= box[1] <= box[3] <= height):
        raise ValueError(
            f"{_OP}: box must be left, top, right and bottom in an image of width {width} and height {height}, "
            f"got {tuple(box)}"
        )
    if crop and not (
        len(crop) == 4
        and min(crop[:2]) >= 0
        and min(crop[2:]) >= 1
        and crop[0] + crop[2] <= size[0]
        and crop[1] + crop[3] <= size[1]
    ):
        raise ValueError(f"{_OP}: crop must be top, left, height and width in size {tuple(size)}, got {tuple(crop)}")
    if table is not None:
        _check.of_dtype(_OP, _check.FLOATS[1:], table=table)
        _check.shape(_OP, "table", table, (channels, 256), "[C, 256]")
        _check.same_device(_OP, image=image, table=table)
    return image, size, box, crop, filter, down_first, has_alpha, is_mirrored, channels_first, table


def _fake(image: Tensor, size: Sequence[int], box: Any, crop: Sequence[int], *options: Any) -> Tensor:
    height, width = crop[2:] if crop else size
    *_, channels_first, table = options
    shape = (image.shape[2], height, width) if channels_first else (height, width, image.shape[2])
    return image.new_empty(shape, dtype=torch.uint8 if table is None else table.dtype)


_resize = define(reference.resize, check=_check_call, fake=_fake)


# --- PIL images -----------------------------------------------------------------------------------------------------


def pixels(image: Any, part: tuple[int, int, int, int] | None = None) -> Tensor:
    """A PIL image of mode L, LA, RGB or RGBA as a tensor `[H, W, C]`, from Pillow 13 on without a copy.

    Args:
        image: the image. It must not change while the tensor is in use. A tensor or an array is taken, too.
        part: left, top, right and bottom of the part that is returned, in whole pixels; None: all of it.

    Raises:
        TypeError: for another mode or kind of image.
    """
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image if min(image.strides, default=0) >= 0 else image.copy())
    if isinstance(image, Tensor):
        return image if part is None else image[part[1] : part[3], part[0] : part[2]]
    mode = getattr(image, "mode", None)
    if mode not in MODES or not hasattr(image, "tobytes"):
        given = _check.kind(image) + (f" of mode {mode}" if mode else "")
        accepted = f"a tensor, an array or a PIL image of mode {', '.join(MODES)}"
        raise TypeError(f"{_OP}: image must be {accepted}, got {given}")
    left, top, right, bottom = part or (0, 0, *image.size)
    # Before, memory that Pillow shares, as `Image.frombuffer` does, ended the process.
    if _PILLOW >= (13, 0):
        found = _shared_pixels(image, left, top, right, bottom)
    else:
        found = np.array(image.crop((left, top, right, bottom))).reshape(bottom - top, right - left, MODES[mode])
    if found.shape[2] != MODES[mode]:  # L, L, L, A or R, G, B, -
        found = found[..., 2:] if mode == "LA" else found[..., :3]
    return torch.from_numpy(found)


def _shared_pixels(image: Any, left: int, top: int, right: int, bottom: int) -> _Pixels:
    try:
        return np.asarray(_SharedPixels(image))[top:bottom, left:right]
    except ValueError:  # a large image is in several blocks; bands of it aren't
        found = np.empty((bottom - top, right - left, 1 if image.mode == "L" else 4), np.uint8)
        rows = _BAND // max(1, right - left) + 1
        for y in range(top, bottom, rows):
            band = image.crop((left, y, right, min(y + rows, bottom)))
            found[y - top : y - top + rows] = np.asarray(_SharedPixels(band))
        return found


_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _SharedPixels:
    """The memory of a PIL image, for `numpy.asarray`: an Arrow array of bytes, or of lists of four."""

    def __init__(self, image: Any) -> None:
        self._owner = image.__arrow_c_array__()[1]
        array = _pointer_of(self._owner, b"arrow_array")
        children, buffers = 6, 5  # fields of 8 bytes
        bands = 1 if image.mode == "L" else 4
        if bands == 4:
            array = _word(_word(array + 8 * children))
        data = _word(_word(array + 8 * buffers) + 8)
        shape = (image.height, image.width, bands)
        self.__array_interface__ = {"shape": shape, "typestr": "|u1", "data": (data, False), "version": 3}


def _word(address: int) -> int:
    return ctypes.c_size_t.from_address(address).value
