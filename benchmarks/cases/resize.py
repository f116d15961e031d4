"""Resize of an RGB photograph in memory, bicubic, to a shortest side; the baseline is Pillow, whose bits ours are."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import evakernels
from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, Work, peer, register
from benchmarks.shapes import Shape

_GRAIN = 8
"""Pixels between random levels: a photograph is smooth."""


def _inputs(shape: Shape, draw: Draw) -> Inputs:
    height, width = shape.batch, shape.tokens
    coarse = draw.integers(256, height // _GRAIN + 1, width // _GRAIN + 1, 3).to(torch.uint8).cpu().numpy()
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    scale = shape.width / min(height, width)
    return {"image": torch.from_numpy(np.array(image)), "size": [int(height * scale), int(width * scale)]}


def _pillow(image: Tensor, size: list[int]) -> Tensor:
    return torch.from_numpy(np.array(Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BICUBIC)))


def _ours(image: Tensor, size: list[int]) -> Tensor:
    return evakernels.image.resize(image, size).permute(1, 2, 0)


def _work(shape: Shape, itemsize: int) -> Work:
    """The image is read once, and the result written once."""
    pixels = shape.batch * shape.tokens
    scale = shape.width / min(shape.batch, shape.tokens)
    return Work(Cost(0, 3 * pixels * (1 + scale**2)))


register(
    Operation(
        name="resize",
        summary="bicubic resize of an 8-bit RGB image",
        inputs=_inputs,
        eager=_pillow,
        ours=_ours,
        baseline="Pillow",
        baseline_package="pillow",
        work=_work,
        shapes={"cpu": ("64x64x224", "427x640x224", "427x640x336", "1281x1920x224", "3000x4000x224")},
        dtypes=("float32",),
        raw=lambda height, width, shortest: Shape(batch=height, tokens=width, width=shortest),
        small="64x64x224",
        by_request=True,
        references=False,
        compiles=False,
    )
)


@peer("resize", package="torchvision", devices=("cpu",))
def torchvision(shape: Shape) -> Function:
    """torchvision of uint8 with antialiasing, close to Pillow."""
    from torchvision.transforms.v2 import functional as F

    bicubic = F.InterpolationMode.BICUBIC
    return lambda image, size: F.resize(image.permute(2, 0, 1), size, bicubic, antialias=True).permute(1, 2, 0)


@peer("resize", package="opencv-python-headless", devices=("cpu",))
def opencv(shape: Shape) -> Function:
    """OpenCV with the mean of areas: its cubic filter doesn't average when it shrinks."""
    import cv2

    return lambda image, size: torch.from_numpy(cv2.resize(image.numpy(), size[::-1], interpolation=cv2.INTER_AREA))
