"""Preprocessing of other libraries on `evakernels.image.resize`: torchvision's `Compose` and transformers' processors.

The steps stay: a `Compose` gets a first step that makes the image a `FastImage`, which the other steps resize as they
do any PIL image. So random draws and pixels stay the same, too.
"""

import sys
from typing import Any

import numpy as np
from PIL import Image

from ..image import COMPILED, resize
from ..ops.resize import MODES
from ..reference.resize import FILTERS
from ._report import Left, Replaced, Report

_FILTERS = {Image.Resampling[name.upper()]: name for name in FILTERS}
_CHANNELS = (1, 3, 4)
_NO_KERNEL = "the compiled library has no kernel here"


class FastImage(Image.Image):
    """A PIL image with a faster `resize` of the same bits, and so the images that are made from it."""

    @classmethod
    def of(cls, image: Image.Image) -> "FastImage":
        """The image, without a copy of its pixels."""
        image.load()
        fast = image._new(image.im)
        fast.__class__ = cls
        fast.readonly = 1  # a step that writes copies the pixels first
        return fast  # type: ignore[return-value]

    def _new(self, im: Any) -> Image.Image:
        new = super()._new(im)
        new.__class__ = type(self)
        return new

    def resize(
        self, size: Any, resample: int | None = None, box: Any = None, reducing_gap: float | None = None
    ) -> Image.Image:
        filter = _FILTERS.get(Image.Resampling.BICUBIC if resample is None else resample)  # type: ignore[call-overload]
        width, height = size
        is_same = (width, height) == self.size
        if not COMPILED or filter is None or self.mode not in MODES or reducing_gap is not None or is_same:
            return super().resize(size, resample, box, reducing_gap)
        levels = resize(self, (height, width), box, filter).numpy()
        new = Image.merge(self.mode, [Image.fromarray(plane) for plane in levels])
        new.info = self.info.copy()
        new.__class__ = type(self)
        return new


def use_fast_images(*inputs: Any) -> Any:
    """The step that `accelerate` puts before the others of a `Compose`."""
    outputs = tuple(FastImage.of(value) if isinstance(value, Image.Image) else value for value in inputs)
    return outputs if len(outputs) > 1 else outputs[0]


class _Planes(Image.Image):
    """An array `[C, H, W]` in place of a PIL image."""

    def __init__(self, planes: Any) -> None:
        super().__init__()
        self.planes, self.shape = planes, planes.shape
        self._size = (planes.shape[2], planes.shape[1])

    def resize(self, size: Any, resample: Any = None, *args: Any, **options: Any) -> Any:
        levels = resize(self.planes.transpose(1, 2, 0), (size[1], size[0]), None, _FILTERS[resample])
        return levels.permute(1, 2, 0).numpy()


class _FastProcessor:
    """Stands before transformers' `PilBackend` in the order of bases, behind the processor's own class."""

    def resize(
        self, image: Any, size: Any, resample: Any = None, reducing_gap: int | None = None, **options: Any
    ) -> Any:
        known = resample in _FILTERS and reducing_gap is None
        if known and image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] in _CHANNELS:
            image = _Planes(image)
        return super().resize(image, size, resample, reducing_gap, **options)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__bases__[0],), *super().__reduce_ex__(protocol)[2:]


def _rebuild(original: type) -> Any:
    return object.__new__(_processor_class(original))


def _processor_class(original: type) -> type:
    backend = _pil_backend()
    fast = type(_FastProcessor.__name__, (_FastProcessor, backend), {})
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original, fast), {**names, "__reduce_ex__": _FastProcessor.__reduce_ex__})


def _pil_backend() -> Any:
    return getattr(sys.modules.get("transformers.image_processing_backends"), "PilBackend", type(None))


# --- accelerate and restore -------------------------------------------------------------------------------------------


def accelerate(transform: Any) -> Report:
    """Makes a transform resize PIL images with the op; see `evakernels.accelerate`."""
    processor = getattr(transform, "image_processor", transform)
    entry = ("", type(processor).__name__)
    if getattr(processor, "backend", None) == "torchvision":
        return Report(left=[Left(*entry, 'resizes tensors, not PIL images; load it with backend="pil"')])
    if isinstance(processor, _pil_backend()):
        if not COMPILED:
            return Report(left=[Left(*entry, _NO_KERNEL)])
        if not isinstance(processor, _FastProcessor):
            processor.__class__ = _processor_class(type(processor))
        return Report(replaced=[Replaced(*entry, "resize", "cpu")])
    steps, report = _steps(transform), Report()
    for number, step in enumerate(steps):
        if hasattr(step, "interpolation"):
            entry, reason = (str(number), type(step).__name__), _reason(step)
            if reason is None:
                report.replaced.append(Replaced(*entry, "resize", "cpu"))
            else:
                report.left.append(Left(*entry, reason))
    if report.replaced and use_fast_images not in steps:
        steps.insert(0, use_fast_images)
    return report


def restore(transform: Any) -> int:
    """Undoes `accelerate`; returns the number of changed objects."""
    processor = getattr(transform, "image_processor", transform)
    if isinstance(processor, _FastProcessor):
        processor.__class__ = type(processor).__bases__[0]
        return 1
    if isinstance(processor, _pil_backend()) or use_fast_images not in _steps(transform):
        return 0
    _steps(transform).remove(use_fast_images)
    return 1


def _reason(step: Any) -> str | None:
    """Why a step doesn't resize by the op."""
    if not COMPILED:
        return _NO_KERNEL
    modes = step.interpolation if isinstance(step.interpolation, (list, tuple)) else [step.interpolation]
    others = [mode for mode in modes if getattr(mode, "value", mode) not in _FILTERS.values()]
    return f"its interpolation is {getattr(others[0], 'value', others[0])}" if others else None


def _steps(transform: Any) -> list[Any]:
    steps = getattr(transform, "transforms", None)
    if not isinstance(steps, list):
        accepted = "a torch.nn.Module, torchvision's Compose or an image processor of transformers"
        raise TypeError(f"accelerate: model must be {accepted}, got {type(transform).__name__}")
    return steps
