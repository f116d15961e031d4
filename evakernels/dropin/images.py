"""Preprocessing of other libraries on `evakernels.image.resize`: torchvision's `Compose` and transformers' processors.

The steps stay: a `Compose` gets a first step that makes the image a `FastImage`, which the other steps resize as they
do any PIL image. So random draws and pixels stay the same, too.
"""

import sys
from typing import Any

import numpy as np
from PIL import Image

from ..image import COMPILED, pixels, resize
from ..ops.resize import MODES
from ._report import Left, Replaced, Report

_FILTERS = {Image.Resampling[name.upper()]: name for name in ("box", "bilinear", "hamming", "bicubic", "lanczos")}
_CHANNELS = (1, 3, 4)


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
        if filter is None or self.mode not in MODES or reducing_gap is not None or (width, height) == self.size:
            return super().resize(size, resample, box, reducing_gap)
        levels = resize(self, (height, width), box, filter, channels_first=False).numpy()
        new = Image.fromarray(levels if self.mode != "L" else levels[..., 0])
        new.info = self.info.copy()
        new.__class__ = type(self)
        return new


class UseFastImages:
    """The step that `accelerate` puts before the others of a `Compose`."""

    def __call__(self, image: Any) -> Any:
        return FastImage.of(image) if isinstance(image, Image.Image) else image

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class _Planes(Image.Image):
    """An array `[C, H, W]` in place of a PIL image."""

    def __init__(self, planes: Any) -> None:
        super().__init__()
        self.planes, self.shape = planes, planes.shape
        self._size = (planes.shape[2], planes.shape[1])

    def resize(self, size: Any, resample: Any = None, *args: Any, **options: Any) -> Any:
        levels = resize(self.planes.transpose(1, 2, 0), (size[1], size[0]), None, _FILTERS[resample])
        return levels.numpy().transpose(1, 2, 0)


class _FastProcessor:
    """Stands before transformers' `PilBackend` in the order of bases, behind the processor's own class."""

    def resize(
        self, image: Any, size: Any, resample: Any = None, reducing_gap: int | None = None, **options: Any
    ) -> Any:
        known = resample in _FILTERS and reducing_gap is None
        if known and image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] in _CHANNELS:
            image = _Planes(image)
        return super().resize(image, size, resample, reducing_gap, **options)  # type: ignore[misc]

    def convert_to_rgb(self, image: Any, *args: Any, **options: Any) -> Any:
        if isinstance(image, Image.Image) and image.mode == "RGB":
            return pixels(image).numpy()
        return super().convert_to_rgb(image, *args, **options)  # type: ignore[misc]

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


def _is_fast(processor: Any) -> bool:
    return isinstance(processor, _FastProcessor)


# --- accelerate and restore -------------------------------------------------------------------------------------------


def accelerate(transform: Any) -> Report:
    """Makes a transform resize PIL images with the op; see `evakernels.accelerate`."""
    processor = getattr(transform, "image_processor", transform)
    name = type(processor).__name__
    if isinstance(processor, _pil_backend()):
        if not COMPILED:
            return Report(left=[Left("", name, "the compiled library has no kernel here")])
        if not _is_fast(processor):
            processor.__class__ = _processor_class(type(processor))
        return Report(replaced=[Replaced("", name, "resize", "cpu")])
    if getattr(processor, "backend", None) == "torchvision":
        return Report(left=[Left("", name, 'resizes tensors, not PIL images; load it with backend="pil"')])
    steps = _steps(transform)
    report = Report()
    for number, step in enumerate(steps):
        if hasattr(step, "interpolation"):
            reason = _reason(step)
            entry = (str(number), type(step).__name__)
            if reason is None:
                report.replaced.append(Replaced(*entry, "resize", "cpu"))
            else:
                report.left.append(Left(*entry, reason))
    if report.replaced and not any(isinstance(step, UseFastImages) for step in steps):
        steps.insert(0, UseFastImages())
    return report


def restore(transform: Any) -> int:
    """Undoes `accelerate`; returns the number of changed objects."""
    processor = getattr(transform, "image_processor", transform)
    if isinstance(processor, _pil_backend()):
        was_fast = _is_fast(processor)
        if was_fast:
            processor.__class__ = type(processor).__bases__[0]
        return int(was_fast)
    steps = _steps(transform)
    before = len(steps)
    steps[:] = [step for step in steps if not isinstance(step, UseFastImages)]
    return before - len(steps)


def _reason(step: Any) -> str | None:
    """Why a step doesn't resize by the op."""
    if not COMPILED:
        return "the compiled library has no kernel here"
    modes = step.interpolation if isinstance(step.interpolation, (list, tuple)) else [step.interpolation]
    others = [mode for mode in modes if getattr(mode, "value", mode) not in _FILTERS.values()]
    return f"its interpolation is {getattr(others[0], 'value', others[0])}" if others else None


def _steps(transform: Any) -> list[Any]:
    steps = getattr(transform, "transforms", None)
    if not isinstance(steps, list):
        accepted = "a torch.nn.Module, torchvision's Compose or an image processor of transformers"
        raise TypeError(f"accelerate: model must be {accepted}, got {type(transform).__name__}")
    return steps
