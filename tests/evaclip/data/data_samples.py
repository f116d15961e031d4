"""Numbered samples: image, caption and tensor hold the number."""

import itertools
import json

import torch
from image_files import as_file
from PIL import Image

from evaclip.data import TrainLoader
from evaclip.data.order import U64


def picture(number: int, size: int = 8, kind: str = "png") -> bytes:
    """An image file with the number as its colour (lossless for PNG, below 65536)."""
    return as_file(Image.new("RGB", (size, size), (number // 256, number % 256, 7)), kind)


def sample(number: int) -> tuple[str, dict[str, bytes]]:
    """A sample in img2dataset's layout."""
    facts = {"caption": f"caption {number}", "captions": [f"caption {number}", f"caption {number + 1000}"]}
    members = {"png": picture(number), "txt": f"caption {number}\n".encode(), "json": json.dumps(facts).encode()}
    return f"{number:06d}", members


def number_transform(image: Image.Image, seed: int = 0) -> torch.Tensor:
    """[3, 1, 1]: the sample's number, the draw of its seed, and a constant."""
    red, green, _ = image.convert("RGB").getpixel((0, 0))
    return torch.tensor([red * 256 + green, seed % 10007, 1.0]).reshape(3, 1, 1)


def number_tokens(captions: list[str], seeds: U64) -> torch.Tensor:
    """[n, 2]: the number in each caption, and the draw of its seed."""
    pairs = zip(captions, seeds.tolist(), strict=True)
    return torch.tensor([[int(caption.split()[-1]), seed % 10007] for caption, seed in pairs])


def make_loader(source, batch_size=8, **options) -> TrainLoader:
    options = {"seed": 3, "window": 20, "transform": number_transform, **options}
    return TrainLoader(source, batch_size=batch_size, targets=number_tokens, **options)


def take(loader: TrainLoader, batches: int, position: int = 0) -> list:
    stream = loader.batches(position)
    taken = list(itertools.islice(stream, batches))
    stream.close()
    return taken


def numbers(batches: list) -> list[int]:
    """The numbers of the samples, read from the pictures."""
    return torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).int().tolist()
