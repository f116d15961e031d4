"""From a PIL image to the tensor or the packed patches that the vision tower takes.

The random draws of a training transform depend on its seed alone: the same seed gives the same tensor in any thread,
worker or process.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from evaclip.augmentation import Augmentation, Range
from evaclip.model.config import Interpolation, Preprocess, Resize, VisionConfig
from evaclip.packing import PackedImages, drop_patches, pack_images
from evaclip.pixels import eight_bit
from evakernels.dropin.images import FastImage
from evakernels.image import COMPILED, level_table, pixels, resize

Color = tuple[int, int, int]
Images = TypeVar("Images", Tensor, PackedImages)

WHITE: Color = (255, 255, 255)
_CROP_ATTEMPTS = 10
_FLATTEST = 100
"""Limit of the longer side over the shorter one before a crop: an image of 1 x 65,500 pixels would take 10 GB."""
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_DRAWS = 16


def native_size(height: int, width: int, patch: int, max_patches: int) -> tuple[int, int]:
    """The size `(height, width)` of NaFlex (SigLIP 2, Tschannen et al. 2025, arXiv 2502.14786) for an image.

    The image is scaled by the largest factor at which its sides, rounded up to whole patches, hold at most
    `max_patches` patches; small images are enlarged. At least one patch remains. The search is in integers, so the
    limit is exact.

    Args:
        height, width: of the image, in pixels.
        patch: side of a patch in pixels.
        max_patches: limit of rows times columns.

    Raises:
        ValueError: an argument is less than 1.

    Example:
        `native_size(480, 640, patch=16, max_patches=196)`  # (192, 256): 12 x 16 patches
    """
    for name, value in (("height", height), ("width", width), ("patch", patch), ("max_patches", max_patches)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    rows = columns = 1
    while True:
        # A growing image first exceeds `rows` patches if rows / height < columns / width; both at once if equal.
        ahead = rows * width - columns * height
        taller, wider = rows + (ahead <= 0), columns + (ahead >= 0)
        if taller * wider > max_patches:
            return rows * patch, columns * patch
        rows, columns = taller, wider


@dataclass(frozen=True)
class NativeSize:
    """A size that keeps each image's aspect ratio, see `native_size`; stands for `size` in a transform."""

    patch_size: int
    max_patches: int


ImageSize = int | tuple[int, int] | NativeSize


@dataclass(frozen=True)
class EvalTransform:
    """PIL image of any mode and size -> float32 `[3, height, width]`, normalised.

    With a `NativeSize` the whole image is resized, without the options `resize` and `crop` of `preprocess`.

    Transparent images are laid on white; pixels of more than 8 bits are scaled, see `eight_bit`; palettes and single
    bits become RGB before the resize, as in EVA-CLIP's loader of shards. All others give the same bits as open_clip's
    transform; of images more than 100 times as long as wide the ends go first, which may change a last bit.
    """

    size: ImageSize
    preprocess: Preprocess = field(default_factory=Preprocess)

    def __call__(self, image: Image.Image) -> Tensor:
        return self._resized(image, _pixel_values(self.preprocess))

    def levels(self, image: Image.Image) -> Tensor:
        """The same before `Normalization`, uint8 `[3, height, width]`: a quarter of the bytes."""
        return self._resized(image, None)

    def _resized(self, image: Image.Image, values: Tensor | None) -> Tensor:
        image = self._opaque(eight_bit(image))
        height, width = shape = resized = _shape(self.size, image.height, image.width)
        if not isinstance(self.size, NativeSize):
            resized = [int(side / self.preprocess.crop) for side in shape]
            if self.preprocess.resize == "shortest":
                image = _without_ends(image)
                resized = _shortest(image, resized[0]) if resized[0] == resized[1] else _covering(image, resized)
        top, left = round((resized[0] - height) / 2), round((resized[1] - width) / 2)
        if _has_kernel(image) and resized[0] >= height and resized[1] >= width:
            crop = (top, left, height, width)
            return resize(_rgb(image), resized, filter=self.preprocess.interpolation, crop=crop, table=values)
        image = _resize(image, resized, self.preprocess.interpolation)
        return _to_tensor(image.crop((left, top, left + width, top + height)), values)

    def _opaque(self, image: Image.Image) -> Image.Image:
        return _on_background(image, WHITE)


@dataclass(frozen=True)
class OpaqueTransform(EvalTransform):
    """`EvalTransform` of an image that is made RGB first, as timm reads it: transparent pixels keep their colour.

    Images of any mode but those of more than 8 bits give the same bits as timm's transform.
    """

    def _opaque(self, image: Image.Image) -> Image.Image:
        return _rgb(image)


@dataclass(frozen=True)
class TrainTransform:
    """PIL image of any mode and size -> float32 `[3, height, width]`, augmented and normalised.

    With a `NativeSize` the crop's `ratio` is relative to the image's width / height: a panorama stays one.

    `data.transform` names this class, or one of your own: a subclass has `background` and `recolored` to override.
    """

    size: ImageSize
    preprocess: Preprocess = field(default_factory=Preprocess)
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __call__(self, image: Image.Image, seed: int | None = None) -> Tensor:
        """The augmented image, a pure function of `image` and `seed`; None draws a seed from torch."""
        return self._augmented(image, seed, _pixel_values(self.preprocess))

    def levels(self, image: Image.Image, seed: int | None = None) -> Tensor:
        """The same before `Normalization`, uint8 `[3, height, width]`: a quarter of the bytes."""
        return self._augmented(image, seed, None)

    def _augmented(self, image: Image.Image, seed: int | None, values: Tensor | None) -> Tensor:
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        generator = torch.Generator().manual_seed(seed)
        options = self.augmentation
        # Before the crop: the pixel range is taken from the whole image.
        image = eight_bit(image)
        aspect = image.width / image.height if isinstance(self.size, NativeSize) else 1.0
        ratio = (aspect * options.ratio[0], aspect * options.ratio[1])
        top, left, height, width = crop_box(image.height, image.width, options.scale, ratio, generator)
        draws = _draws(generator)
        background = self.background(draws)
        right, bottom = left + width, top + height
        image.load()  # which may find a transparent colour
        if self._only_crops and image.mode == "RGB" and not image.has_transparency_data and COMPILED:
            part, shape = pixels(image)[top:bottom, left:right], _shape(self.size, height, width)
            mirrored = _happens(options.flip, draws)
            return resize(part, shape, filter=self.preprocess.interpolation, mirrored=mirrored, table=values)
        image = _on_background(image.crop((left, top, right, bottom)), background)
        image = _resize(image, _shape(self.size, image.height, image.width), self.preprocess.interpolation)
        image = _rgb(image)
        if _happens(options.flip, draws):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if options.moves:
            image = _move(image, options, background, draws)
        return _to_tensor(self.recolored(image, draws), values)

    @property
    def _only_crops(self) -> bool:
        """Whether nothing but crop, resize and flip happens to an image."""
        is_own = type(self).recolored is not TrainTransform.recolored
        return not (is_own or self.augmentation.moves or self.augmentation.recolors)

    def background(self, draws: Iterator[float]) -> Color:
        """The colour behind a transparent image and around a shifted one; `draws` are numbers in [0, 1)."""
        return WHITE

    def recolored(self, image: Image.Image, draws: Iterator[float]) -> Image.Image:
        """The RGB image of the final size, its colours changed at random."""
        return _recolor(image, self.augmentation, draws)


@dataclass(frozen=True)
class PackedTransform:
    """PIL image, and a seed in training -> one packed image, from the `[3, height, width]` of `transform`.

    Patch dropout without a seed draws one from torch.

    Attributes:
        transform: gives heights and widths that are multiples of `patch_size`.
        dropout: share of the patches that are dropped at random.
    """

    transform: Callable[..., Any]
    patch_size: int
    dropout: float = 0.0

    @property
    def preprocess(self) -> Preprocess:
        preprocess: Preprocess = getattr(self.transform, "preprocess", Preprocess())
        return preprocess

    def __call__(self, image: Image.Image, seed: int | None = None) -> PackedImages:
        if seed is None and self.dropout:
            seed = int(torch.randint(2**63 - 1, ()))
        if seed is None:
            return pack_images([self.transform(image)], self.patch_size)
        packed = pack_images([self.transform(image, seed)], self.patch_size)
        # Another stream than the one that the transform draws from.
        return drop_patches(packed, self.dropout, Generator().manual_seed(seed ^ 1)) if self.dropout else packed


def image_transform(vision: VisionConfig, preprocess: Preprocess) -> EvalTransform | PackedTransform:
    """The transform of images for evaluation; it packs them if `preprocess.max_patches` is set."""
    if preprocess.max_patches is None:
        return EvalTransform(vision.image_size, preprocess)
    size = NativeSize(vision.patch_size, preprocess.max_patches)
    return PackedTransform(EvalTransform(size, preprocess), vision.patch_size)


class Normalization:
    """uint8 levels -> normalised float32 images, on a device; bit-exact with the transforms on a CPU."""

    def __init__(self, preprocess: Preprocess, device: torch.device | str = "cpu") -> None:
        # 255 is a tensor too: by a number GPUs don't divide, they multiply by its reciprocal.
        self._constants = [
            torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1).to(device)
            for values in ((255.0,), preprocess.mean, preprocess.std)
        ]

    def __call__(self, levels: Images) -> Images:
        """float32 of uint8 `[..., 3, height, width]` or of packed images; anything but uint8 as it is."""
        if isinstance(levels, PackedImages):
            return replace(levels, patches=self(levels.patches.unflatten(1, (3, 1, -1))).flatten(1))
        if levels.dtype != torch.uint8:
            return levels
        top, mean, std = self._constants
        return levels.to(torch.float32).div_(top).sub_(mean).div_(std)


def levels_of(transform: Callable[..., Any], preprocess: Preprocess) -> Callable[..., Any]:
    """The transform that returns uint8 levels for `Normalization`; the transform itself if it has none."""
    if isinstance(transform, PackedTransform):
        return replace(transform, transform=levels_of(transform.transform, preprocess))
    for kind in (TrainTransform, EvalTransform):
        # A subclass may do anything to the tensors.
        if isinstance(transform, kind) and type(transform).__call__ is kind.__call__:
            return transform.levels if transform.preprocess == preprocess else transform
    return transform


def _shape(size: ImageSize, height: int, width: int) -> list[int]:
    """The size of the result for an image of this height and width."""
    if isinstance(size, NativeSize):
        return list(native_size(height, width, size.patch_size, size.max_patches))
    return list(size) if isinstance(size, tuple) else [size, size]


def _shortest(image: Image.Image, side: int) -> list[int]:
    """The size with the image's proportions and a shortest side of `side`."""
    short, long = sorted(image.size)
    other = int(side * long / short)
    return [side, other] if image.height < image.width else [other, side]


def _without_ends(image: Image.Image) -> Image.Image:
    """The centre of an image that is flatter than any crop."""
    left, top = (max(0, side - _FLATTEST * min(image.size)) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def _covering(image: Image.Image, shape: Sequence[int]) -> list[int]:
    """The smallest size of the image's own proportions that covers a rectangle."""
    # Divided, not multiplied by the reciprocal: to round like open_clip and timm.
    ratio = min(image.height / shape[0], image.width / shape[1])
    return [round(image.height / ratio), round(image.width / ratio)]


def train_transform(
    size: int,
    mean: Sequence[float] = Preprocess.mean,
    std: Sequence[float] = Preprocess.std,
    *,
    scale: Range = Augmentation.scale,
    interpolation: Interpolation = "bicubic",
    augmentation: Augmentation | None = None,
) -> TrainTransform:
    """The transform of training images.

    Args:
        size: side of the result in pixels.
        mean, std: per RGB channel on the scale 0..1.
        scale: share of the area that the random crop covers, where `augmentation` isn't given.
        interpolation: of the resize.
        augmentation: everything that happens at random.

    Returns:
        A callable `(PIL image, seed: int) -> float32 [3, size, size]`.
    """
    preprocess = Preprocess(_triple(mean), _triple(std), interpolation)
    return TrainTransform(size, preprocess, augmentation or Augmentation(scale=scale))


def eval_transform(
    size: int,
    mean: Sequence[float] = Preprocess.mean,
    std: Sequence[float] = Preprocess.std,
    *,
    resize: Resize = "shortest",
    interpolation: Interpolation = "bicubic",
) -> EvalTransform:
    """The transform of images for evaluation and inference.

    Args:
        size: side of the result in pixels.
        mean, std: per RGB channel on the scale 0..1.
        resize: `shortest` resizes the shortest side to `size` and crops the centre; `squash` changes the
            proportions.
        interpolation: of the resize.

    Returns:
        A callable `PIL image -> float32 [3, size, size]`.
    """
    return EvalTransform(size, Preprocess(_triple(mean), _triple(std), interpolation, resize))


def crop_box(height: int, width: int, scale: Range, ratio: Range, generator: Generator) -> tuple[int, int, int, int]:
    """A random part of an image as `(top, left, height, width)`, of random area and proportions.

    Draws the same numbers in the same order as torchvision's `RandomResizedCrop`.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * _uniform_as_torch(scale, generator)
        aspect = math.exp(_uniform_as_torch(log_ratio, generator))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = _below(height - box_height + 1, generator)
            left = _below(width - box_width + 1, generator)
            return top, left, box_height, box_width
    # No box fits into a very long or narrow image: its centre, in the nearest proportions that are allowed.
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width, box_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _on_background(image: Image.Image, color: Color) -> Image.Image:
    """A transparent image laid on a colour; any other in its own mode, if Pillow can interpolate in that."""
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode in ("P", "1") else image
    canvas = Image.new("RGBA", image.size, (*color, 255))
    return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _has_kernel(image: Image.Image) -> bool:
    """Whether the image is resized as RGB, without Pillow. Of grey images the conversion may come first."""
    return COMPILED and image.mode in ("RGB", "L")


def _resize(image: Image.Image, shape: Sequence[int], interpolation: Interpolation) -> Image.Image:
    size = (shape[1], shape[0])
    return image if image.size == size else FastImage.of(image).resize(size, _RESAMPLING[interpolation])


def _move(image: Image.Image, options: Augmentation, background: Color, draws: Iterator[float]) -> Image.Image:
    """Rotates about the middle, zooms and shifts, as torchvision's `affine` does."""
    angle = math.radians(_uniform((-options.rotation, options.rotation), draws))
    reach = options.translation * image.width
    right, down = (round(_uniform((-reach, reach), draws)) for _ in range(2))
    zoom = _uniform(options.zoom, draws)
    # From a place in the result to that in the image.
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    x, y = image.width / 2, image.height / 2
    offset_x, offset_y = x - cos * (x + right) - sin * (y + down), y + sin * (x + right) - cos * (y + down)
    matrix = (cos, sin, offset_x, -sin, cos, offset_y)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=background)


def _recolor(image: Image.Image, options: Augmentation, draws: Iterator[float]) -> Image.Image:
    # Like torchvision's `adjust_` functions, but in Pillow's calls, which take a fraction of the time.
    if options.brightness:
        black = Image.new("RGB", image.size)
        image = Image.blend(black, image, _uniform((1 - options.brightness, 1 + options.brightness), draws))
    if options.contrast:
        mean = (_mean_gray(image),) * 3
        flat = Image.new("RGB", image.size, mean)
        image = Image.blend(flat, image, _uniform((1 - options.contrast, 1 + options.contrast), draws))
    if options.saturation:
        gray = image.convert("L").convert("RGB")
        image = Image.blend(gray, image, _uniform((1 - options.saturation, 1 + options.saturation), draws))
    if options.hue:
        image = _turn_hue(image, _uniform((-options.hue, options.hue), draws))
    if _happens(options.grayscale, draws):
        image = image.convert("L").convert("RGB")
    return image


def _mean_gray(image: Image.Image) -> int:
    return int(np.asarray(image.convert("L")).mean() + 0.5)


def _turn_hue(image: Image.Image, share: float) -> Image.Image:
    """Rotates all hues by this share of the colour circle."""
    hue, saturation, value = image.convert("HSV").split()
    rotated = np.asarray(hue) + np.uint8(int(share * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(rotated), saturation, value)).convert("RGB")


def _to_tensor(image: Image.Image, values: Tensor | None) -> Tensor:
    """`[3, height, width]`, levels or values."""
    levels = np.asarray(_rgb(image))
    if values is None:
        return torch.from_numpy(levels.transpose(2, 0, 1).copy())
    planes = np.empty((3, *levels.shape[:2]), np.float32)
    for channel, of_channel in enumerate(values.numpy()):
        np.take(of_channel, levels[:, :, channel], out=planes[channel], mode="clip")
    return torch.from_numpy(planes)


@cache
def _pixel_values(preprocess: Preprocess) -> Tensor:
    """Normalised values of the 256 levels in each channel, `[3, 256]`."""
    return level_table(preprocess.mean, preprocess.std)


def _draws(generator: Generator) -> Iterator[float]:
    """Endless numbers in [0, 1), several a call: one alone costs as much as sixteen."""
    while True:
        yield from torch.rand(_DRAWS, generator=generator).tolist()


def _happens(probability: float, draws: Iterator[float]) -> bool:
    return probability > 0 and next(draws) < probability


def _uniform(bounds: Range, draws: Iterator[float]) -> float:
    low, high = bounds
    return low + (high - low) * next(draws)


def _uniform_as_torch(bounds: Range, generator: Generator) -> float:
    return torch.empty(1).uniform_(*bounds, generator=generator).item()


def _below(limit: int, generator: Generator) -> int:
    return int(torch.randint(limit, (1,), generator=generator))


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue
