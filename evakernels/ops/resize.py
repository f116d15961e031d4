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
        filter: `"box"`, `"bilinear"`, `"bicubic"` or `"lanczos"`.
        crop: part of the result that is computed: top, left, height and width. None: all of it.
        mirrored: flip the result, or the part of it, from left to right.
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
    number = list(reference.FILTERS).index(filter)
    out: Tensor = _resize(pixels(image), size, box, crop, number, mirrored, table)
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
    box: Sequence[float] | None,
    crop: Sequence[int] | None,
    filter: int,
    is_mirrored: bool,
    table: Tensor | None,
) -> Any:
    _check.dtypes(_OP, (torch.uint8,), image=image)
    if image.dim() != 3 or not 1 <= image.shape[2] <= 4 or 0 in image.shape:
        raise ValueError(f"{_OP}: image must have shape [H, W, 1 to 4] with H, W > 0, got {tuple(image.shape)}")
    height, width, channels = image.shape
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{_OP}: size must be a height and a width of 1 or more, got {tuple(size)}")
    box, crop = box or (0, 0, width, height), crop or (0, 0, *size)
    if not (len(box) == 4 and 0 <= box[0] <= box[2] <= width and 0 <= box[1] <= box[3] <= height):
        accepted = f"left, top, right and bottom in an image of width {width} and height {height}"
        raise ValueError(f"{_OP}: box must be {accepted}, got {tuple(box)}")
    is_within = len(crop) == 4 and all(0 <= crop[i] < crop[i] + crop[i + 2] <= size[i] for i in (0, 1))
    if not is_within:
        raise ValueError(f"{_OP}: crop must be top, left, height and width in size {tuple(size)}, got {tuple(crop)}")
    if table is not None:
        _check.dtypes(_OP, _check.FLOATS[1:], table=table)
        _check.shape(_OP, "table", table, (channels, 256), "[C, 256]")
        _check.same_device(_OP, image=image, table=table)
    return image, size, box, crop, filter, _is_down_first(height, width, *size), is_mirrored, table


def _fake(image: Tensor, size: Any, box: Any, crop: Sequence[int], *options: Any) -> Tensor:
    table = options[-1]
    return image.new_empty((image.shape[2], *crop[2:]), dtype=torch.uint8 if table is None else table.dtype)


_resize = define(reference.resize, check=_check_call, fake=_fake)


# --- PIL images -----------------------------------------------------------------------------------------------------


def pixels(image: Any) -> Tensor:
    """A PIL image of mode L, LA, RGB or RGBA as a tensor `[H, W, C]`, from Pillow 13 on without a copy.

    The image must not change while the tensor is in use. Tensors and arrays become tensors.

    Raises:
        TypeError: for another mode or kind of image.
    """
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image if min(image.strides, default=0) >= 0 else image.copy())
    if isinstance(image, Tensor):
        return image
    mode = getattr(image, "mode", None)
    if mode not in MODES or not hasattr(image, "tobytes"):
        given = _check.kind(image) + (f" of mode {mode}" if mode else "")
        accepted = f"a tensor, an array or a PIL image of mode {', '.join(MODES)}"
        raise TypeError(f"{_OP}: image must be {accepted}, got {given}")
    # Before Pillow 13, memory that Pillow shares, as `Image.frombuffer` does, ended the process.
    if _PILLOW < (13, 0):
        return torch.from_numpy(np.array(image).reshape(image.height, image.width, MODES[mode]))
    levels = torch.from_numpy(_shared_pixels(image))
    if mode == "LA":  # stored as L, L, L, A
        return levels[..., 2:]
    return levels[..., : MODES[mode]]


def _shared_pixels(image: Any) -> _Pixels:
    try:
        return np.asarray(_SharedPixels(image))
    except ValueError:  # a large image is in several blocks; bands of it aren't
        levels = np.empty((image.height, image.width, 1 if image.mode == "L" else 4), np.uint8)
        rows = _BAND // max(1, image.width) + 1
        for y in range(0, image.height, rows):
            band = image.crop((0, y, image.width, min(y + rows, image.height)))
            levels[y : y + rows] = np.asarray(_SharedPixels(band))
        return levels


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
