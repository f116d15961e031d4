"""Random augmentation in a training configuration; without torch, so that reading one is fast."""

from dataclasses import dataclass

from evaclip.errors import UserError

Range = tuple[float, float]


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of training images; the default is EVA-CLIP's random crop.

    Attributes:
        scale: share of the image's area that the crop covers, smallest and largest.
        ratio: width / height of the crop, smallest and largest.
        flip: probability of a horizontal flip.
        rotation: largest rotation, in degrees.
        translation: largest shift, as a share of the side.
        zoom: factor of size, smallest and largest.
        brightness, contrast, saturation: each is changed by a factor in `[1 - value, 1 + value]`.
        hue: largest shift of the hue, as a share of the colour circle, at most 0.5.
        grayscale: probability of a greyscale image.
    """

    scale: Range = (0.9, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    flip: float = 0.0
    rotation: float = 0.0
    translation: float = 0.0
    zoom: Range = (1.0, 1.0)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0

    def __post_init__(self) -> None:
        for name in ("scale", "ratio", "zoom"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"augmentation.{name} is {low}..{high}; expected 0 < smallest <= largest")
            object.__setattr__(self, name, (float(low), float(high)))
        if self.scale[1] > 1:
            raise UserError(f"augmentation.scale is {self.scale}; a crop can't exceed the image (1.0)")
        limits = {"rotation": 180.0, "translation": 1.0, "flip": 1.0, "hue": 0.5, "grayscale": 1.0}
        limits |= dict.fromkeys(("brightness", "contrast", "saturation"), 1.0)
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise UserError(f"augmentation.{name} is {getattr(self, name)}; expected 0..{limit:g}")

    @property
    def moves(self) -> bool:
        """Whether the image is rotated, shifted or zoomed."""
        return bool(self.rotation or self.translation or self.zoom != (1.0, 1.0))

    @property
    def recolors(self) -> bool:
        """Whether the colours change."""
        return bool(self.brightness or self.contrast or self.saturation or self.hue or self.grayscale)
