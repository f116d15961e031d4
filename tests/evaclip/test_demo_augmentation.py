"""What the demo's training does to drawings beyond the usual augmentation."""

import hashlib
from dataclasses import replace

import torch
from PIL import Image
from test_transforms import PLAIN, drawing

from evaclip import Augmentation
from evaclip.demo.augmentation import DrawingTransform, outlined
from evaclip.train.recipes import get_recipe
from evaclip.train.transform import training_transform


def test_drawing_transform_is_unchanged() -> None:
    transform = training_transform(get_recipe("emoji").data, 32, PLAIN)
    digest = hashlib.sha256()
    for seed in range(16):
        digest.update((transform(drawing(), seed) * 255).round().to(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == "2ca93bc2376b06ba5c5c2f3fb413013267824c0dd91d84c5ff95d3f008b62208"


def test_drawing_transform_fills_the_background() -> None:
    still = Augmentation(scale=(1, 1), ratio=(1, 1))
    transform = DrawingTransform(64, PLAIN, replace(still, rotation=40, zoom=(0.5, 0.5)))
    corners = []
    for seed in range(32):
        tensor = transform(drawing(), seed)
        assert torch.equal(tensor[:, 0, 0], tensor[:, 63, 63])
        assert tensor[0, 32, 32] == 1
        corners.append(tuple(tensor[:, 0, 0].tolist()))
    assert 12 < corners.count((1, 1, 1)) < 32
    assert len(set(corners)) == 33 - corners.count((1, 1, 1))


def test_an_outline_darkens_edges_and_nothing_else() -> None:
    plain = Image.new("RGB", (64, 64), "white")
    plain.paste((255, 0, 0), (16, 16, 48, 48))
    changed = outlined(plain, 0.5)
    assert changed.getpixel((32, 32)) == (255, 0, 0)
    assert changed.getpixel((4, 4)) == (255, 255, 255)
    edge = changed.getpixel((16, 32))
    assert edge[0] < 255
