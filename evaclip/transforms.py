"""From a PIL image to the tensor that the vision tower takes.

What a training transform draws at random depends on nothing but its seed: the same seed gives the same tensor
in any thread, worker or process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Generator, Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from evaclip.errors import UserError
from evaclip.model.config import Interpolation, Preprocess, Resize

Color = tuple[int, int, int]
Range = tuple[float, float]

WHITE: Color = (255, 255, 255)
_CROP_ATTEMPTS = 10
_OUTLINE_GAIN = 4
_OUTLINE_STRENGTH = (0.5, 1.0)


@dataclass(frozen=True)
class Augmentation:
    """What training does to an image at random; the defaults are EVA-CLIP's recipe: a random crop.

    Attributes:
        scale: share of the image's area that the crop covers, smallest and largest.
        ratio: width / height of the crop, smallest and largest.
        rotation: largest rotation, in degrees.
        translation: largest shift, as a share of the side.
        zoom: factor of size, smallest and largest.
        brightness, contrast, saturation: each is changed by a factor in `[1 - value, 1 + value]`.
        hue: largest shift of the hue, as a share of the colour circle, at most 0.5.
        grayscale: probability of losing the colours.
        background: probability of a random colour behind a transparent picture, instead of white.
        outline: probability of darkened edges, as if contours were drawn, by a strength of 0.5 to 1.
    """

    scale: Range = (0.9, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    rotation: float = 0.0
    translation: float = 0.0
    zoom: Range = (1.0, 1.0)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    background: float = 0.0
    outline: float = 0.0

    def __post_init__(self) -> None:
        for name in ("scale", "ratio", "zoom"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"augmentation.{name} is {low}..{high}; expected 0 < smallest <= largest")
            object.__setattr__(self, name, (float(low), float(high)))
        if self.scale[1] > 1:
            raise UserError(f"augmentation.scale is {self.scale}; a crop can't exceed the image (1.0)")
        limits = {"rotation": 180.0, "translation": 1.0, "hue": 0.5, "grayscale": 1.0}
        limits |= dict.fromkeys(("brightness", "contrast", "saturation", "background", "outline"), 1.0)
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise UserError(f"augmentation.{name} is {getattr(self, name)}; expected 0..{limit:g}")

    @property
    def moves(self) -> bool:
        """Whether the picture is rotated, shifted or zoomed."""
        return bool(self.rotation or self.translation or self.zoom != (1.0, 1.0))


@dataclass(frozen=True)
class EvalTransform:
    """PIL image of any mode and size -> float32 `[3, height, width]`, normalised.

    Transparent pictures are laid on white; all others give the same bits as open_clip's transform.
    """

    size: int | tuple[int, int]
    preprocess: Preprocess = field(default_factory=Preprocess)

    def __call__(self, image: Image.Image) -> Tensor:
        image = _on_background(image, WHITE)
        mode = InterpolationMode(self.preprocess.interpolation)
        shape = _shape(self.size)
        resized = [int(side / self.preprocess.crop) for side in shape]
        if self.preprocess.resize == "shortest":
            resized = resized[:1] if resized[0] == resized[1] else _covering(image, resized)
        image = F.center_crop(F.resize(image, resized, mode), shape)
        return _to_tensor(image, self.preprocess)


@dataclass(frozen=True)
class TrainTransform:
    """PIL image of any mode and size -> float32 `[3, height, width]`, augmented and normalised."""

    size: int | tuple[int, int]
    preprocess: Preprocess = field(default_factory=Preprocess)
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __call__(self, image: Image.Image, seed: int | None = None) -> Tensor:
        """The augmented image, a pure function of `image` and `seed`; None draws a seed from torch."""
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        generator = torch.Generator().manual_seed(seed)
        options = self.augmentation
        background = _random_color(generator) if _happens(options.background, generator) else WHITE
        image = _on_background(image, background)
        mode = InterpolationMode(self.preprocess.interpolation)
        box = crop_box(image.height, image.width, options.scale, options.ratio, generator)
        image = F.resized_crop(image, *box, _shape(self.size), mode).convert("RGB")
        if options.moves:
            image = _move(image, options, background, generator)
        return _to_tensor(_recolor(image, options, generator), self.preprocess)


def _shape(size: int | tuple[int, int]) -> list[int]:
    return list(size) if isinstance(size, tuple) else [size, size]


def _covering(image: Image.Image, shape: Sequence[int]) -> list[int]:
    """The smallest size of the image's own proportions that covers a rectangle."""
    factor = max(shape[0] / image.height, shape[1] / image.width)
    return [max(shape[0], round(image.height * factor)), max(shape[1], round(image.width * factor))]


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
        area = height * width * _uniform(scale, generator)
        aspect = math.exp(_uniform(log_ratio, generator))
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
    """A transparent picture laid on a colour; any other as it is, so that it is resized in its own mode."""
    if not image.has_transparency_data:
        return image
    picture = image.convert("RGBA")
    canvas = Image.new("RGBA", picture.size, (*color, 255))
    return Image.alpha_composite(canvas, picture).convert("RGB")


def _move(image: Image.Image, options: Augmentation, background: Color, generator: Generator) -> Image.Image:
    angle = _uniform((-options.rotation, options.rotation), generator)
    reach = options.translation * image.width
    shift = [round(_uniform((-reach, reach), generator)) for _ in range(2)]
    zoom = _uniform(options.zoom, generator)
    fill = list(map(float, background))
    moved: Image.Image = F.affine(image, angle, shift, zoom, [0.0], InterpolationMode.BILINEAR, fill)
    return moved


def _recolor(image: Image.Image, options: Augmentation, generator: Generator) -> Image.Image:
    changes = (
        (F.adjust_brightness, options.brightness, 1.0),
        (F.adjust_contrast, options.contrast, 1.0),
        (F.adjust_saturation, options.saturation, 1.0),
        (F.adjust_hue, options.hue, 0.0),
    )
    for adjust, strength, center in changes:
        if strength:
            image = adjust(image, _uniform((center - strength, center + strength), generator))
    if _happens(options.grayscale, generator):
        image = F.to_grayscale(image, num_output_channels=3)
    if _happens(options.outline, generator):
        image = _outlined(image, _uniform(_OUTLINE_STRENGTH, generator))
    return image


def _outlined(image: Image.Image, strength: float) -> Image.Image:
    """Darkens a picture where its brightness differs from that of the neighbourhood."""
    gray = image.convert("L")
    edges = ImageChops.difference(gray, gray.filter(ImageFilter.BoxBlur(1)))
    edges = edges.point([min(255, round(strength * _OUTLINE_GAIN * level)) for level in range(256)])
    return ImageChops.subtract(image, Image.merge("RGB", (edges, edges, edges)))


def _to_tensor(image: Image.Image, preprocess: Preprocess) -> Tensor:
    pixels: Tensor = F.to_tensor(image.convert("RGB"))
    F.normalize(pixels, list(preprocess.mean), list(preprocess.std), inplace=True)
    return pixels


def _random_color(generator: Generator) -> Color:
    red, green, blue = torch.randint(256, (3,), generator=generator).tolist()
    return red, green, blue


def _happens(probability: float, generator: Generator) -> bool:
    return probability > 0 and _uniform((0.0, 1.0), generator) < probability


def _uniform(bounds: Range, generator: Generator) -> float:
    return torch.empty(1).uniform_(*bounds, generator=generator).item()


def _below(limit: int, generator: Generator) -> int:
    return int(torch.randint(limit, (1,), generator=generator))


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue
