"""A model small enough to check by hand: a picture of one colour has the feature of the colour's name."""

from pathlib import Path

import torch
from image_files import as_file
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.transforms.functional import to_tensor

from evaclip.commands.main import build_parser
from evaclip.data.shard_writer import write_shard

COLORS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "cyan": (0, 255, 255),
    "magenta": (255, 0, 255), "black": (0, 0, 0), "white": (255, 255, 255),
}  # fmt: skip


class ColorModel(nn.Module):
    """Features are the mean colour around grey; `calls` counts batches."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.calls = 0

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        return self._features(images.mean((2, 3)), normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        return self._features(tokens.float() / 255, normalize)

    def _features(self, color: Tensor, normalized: bool) -> Tensor:
        self.calls += 1
        features = (color - 0.5) * self.scale
        return normalize(features, dim=-1) if normalized else features


def tokenize_colors(texts: list[str]) -> Tensor:
    """A text's last colour as three tokens; a text without a colour is a dark grey."""
    found = [[color for color in COLORS if color in text] for text in texts]
    return torch.tensor([COLORS[names[-1]] if names else (90, 90, 90) for names in found])


class ToTensor:
    """PIL image -> float32 [3, H, W]."""

    def __call__(self, image: Image.Image) -> Tensor:
        return to_tensor(image.convert("RGB"))

    def __repr__(self) -> str:
        return "ToTensor()"


def png(color: tuple[int, int, int], size: int = 8) -> bytes:
    return as_file(Image.new("RGB", (size, size), color))


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    write_shard(path, samples.items())
    return path


def evaclip(*words: object) -> None:
    """One command, as on the command line."""
    args = build_parser().parse_args([str(word) for word in words])
    args.run(args)
