"""Images as files."""

import io

import numpy as np
from PIL import Image


def as_file(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def write_class_folders(root, colors, count, seed=0):
    """Writes `count` images of noise in each colour into a folder of the colour's name; returns the root."""
    noise = np.random.default_rng(seed)
    for name, color in colors.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = noise.integers(0, 90, (20, 24, 3)) + color
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root
