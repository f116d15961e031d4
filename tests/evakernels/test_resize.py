"""`evakernels.image.resize` against Pillow, bit for bit, on each instruction set, and against its reference."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from op_checks import assert_opcheck
from PIL import Image

import evakernels
from evakernels import _native
from evakernels.image import level_table, resize
from evakernels.ops import resize as module

MODES = module.MODES
FILTERS = ("box", "bilinear", "bicubic", "lanczos")
FEW = {"quick": 60, "all": 5000}
LEVELS = np.random.default_rng(0).integers(0, 256, 4 << 22, np.uint8)
LEVELS[::3] //= 128  # many pixels are black, white, transparent or opaque
LEVELS[::3] *= 255

cases = pytest.mark.parametrize("cases", ["quick", pytest.param("all", marks=pytest.mark.exhaustive)])
isas = pytest.mark.parametrize(
    "isa", _native.python_module().build_info()["isas_available"] if _native.is_module_built() else []
)


def pillow(image, size, box=None, filter="bicubic"):
    resized = image.resize((size[1], size[0]), Image.Resampling[filter.upper()], box)
    return np.array(resized).reshape(*size, -1)


def pixels_of(draws, height, width, channels):
    start = draws.randrange(len(LEVELS) - height * width * channels)
    return LEVELS[start : start + height * width * channels].reshape(height, width, channels)


def image_of(pixels):
    return Image.fromarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])


def sizes(draws, longest):
    """Of an image and of its resize, most of them small."""
    while True:
        height, width, *size = (int(longest ** draws.random() + 0.5) for _ in range(4))
        if max(height * width, size[0] * size[1], height * size[1], width * size[0]) < 2e6:
            return height, width, tuple(size)


def box_in(draws, height, width):
    (left, right), (top, bottom) = (sorted(draws.random() * side for _ in range(2)) for side in (width, height))
    box = (left, top, right, bottom)
    return draws.choice([None, box, tuple(map(int, box)), (left, top, left, bottom)])


def in_layout(draws, pixels):
    """The pixels as an image, an array or a tensor, contiguous or not."""
    height, width, channels = pixels.shape
    kind, tensor = draws.randrange(6), torch.from_numpy(pixels.copy())
    if kind == 0:
        return image_of(pixels)
    if kind == 1:
        return pixels[::-1].copy()[::-1]
    if kind == 2:
        return tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if kind == 3:
        wider = torch.zeros(height, width + draws.randrange(3), 4, dtype=torch.uint8)
        wider[:, :width, 4 - channels :] = tensor
        return wider[:, :width, 4 - channels :]
    return pixels if kind == 4 else tensor


@isas
@cases
def test_resize_matches_pillow(isa, cases, monkeypatch):
    run = partial(_native.python_module().resize, isa=isa)
    monkeypatch.setattr(module, "_resize", lambda *args: run(*module._check_call(*args)))
    for seed in range(FEW[cases]):
        draws = random.Random(seed)
        height, width, size = sizes(draws, 4000)
        pixels = pixels_of(draws, height, width, draws.choice(list(MODES.values())))
        box, filter = box_in(draws, height, width), draws.choice(FILTERS)
        expected = pillow(image_of(pixels), size, box, filter)
        top, left = draws.randrange(size[0]), draws.randrange(size[1])
        crop = draws.choice([None, (top, left, draws.randint(1, size[0] - top), draws.randint(1, size[1] - left))])
        if crop:
            expected = expected[top : top + crop[2], left : left + crop[3]]
        options = {"crop": crop, "mirrored": draws.random() < 0.3}
        found = resize(in_layout(draws, pixels), size, box, filter, **options)
        if options["mirrored"]:
            expected = expected[:, ::-1]
        assert np.array_equal(found.permute(1, 2, 0), expected), (seed, height, width, size, box, filter, options)


@cases
@pytest.mark.kernels("cpu")
def test_resize_matches_reference(cases):
    for seed in range(FEW[cases] // 4):
        draws = random.Random(seed)
        height, width, size = sizes(draws, 80)
        channels = draws.randint(1, 4)
        pixels = torch.from_numpy(pixels_of(draws, height, width, channels).copy())
        table = draws.choice([None, torch.randn(channels, 256), torch.randn(channels, 256).bfloat16()])
        call = partial(
            resize, pixels, size, box_in(draws, height, width), draws.choice(FILTERS), crop=(0, 0, *size), table=table
        )
        for mirrored in (False, True):
            found = call(mirrored=mirrored)
            with evakernels.use_backend("reference"):
                assert torch.equal(found, call(mirrored=mirrored)), seed


@pytest.mark.parametrize("size", [(1, 1), (224, 1), (1, 300), (7, 5)])
@pytest.mark.parametrize("shape", [(1, 1), (100_000, 1), (1, 100_000), (3, 4)])
@pytest.mark.kernels("cpu")
def test_extreme_sides(shape, size):
    pixels = pixels_of(random.Random(0), *shape, 3)
    assert np.array_equal(resize(pixels, size).permute(1, 2, 0), pillow(Image.fromarray(pixels), size))


@pytest.mark.parametrize("mode", MODES)
def test_large_image_in_several_blocks(mode):
    pixels = pixels_of(random.Random(0), 1001, 2100 if MODES[mode] == 4 else 4300, MODES[mode])[:, ::-1]
    image = image_of(np.tile(pixels, (3 if mode == "RGBA" else 1, 1, 1)))
    image = image if MODES[mode] > 1 else image.resize((4300, 4100), Image.Resampling.NEAREST)
    assert np.array_equal(resize(image, (30, 40)).permute(1, 2, 0), pillow(image, (30, 40)))


@pytest.mark.parametrize(
    ("version", "shape", "down_first"),
    [((12, 1), (151, 1), False), ((12, 2), (151, 1), True), ((12, 2), (151, 52), False), ((13, 0), (151, 52), True)],
)
def test_order_of_passes_follows_pillow(version, shape, down_first, monkeypatch):
    monkeypatch.setattr(module, "_PILLOW", version)
    pixels = torch.from_numpy(pixels_of(random.Random(0), *shape, 3).copy())
    image, (height, width) = Image.fromarray(pixels.numpy()), shape
    first, then = ((width, 6), (12, 6)) if down_first else ((12, height), (12, 6))
    expected = image.resize(first, Image.Resampling.BICUBIC).resize(then, Image.Resampling.BICUBIC)
    assert np.array_equal(resize(pixels, (6, 12)).permute(1, 2, 0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.kernels("cpu")
def test_table_normalizes_as_torchvision(dtype):
    from torchvision.transforms import functional as F

    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    image = Image.fromarray(pixels_of(random.Random(0), 50, 40, 3))
    tensor = F.to_tensor(image.resize((33, 21), Image.Resampling.BICUBIC))
    expected = F.normalize(tensor, mean, std).to(dtype)
    assert torch.equal(resize(image, (21, 33), table=level_table(mean, std, dtype)), expected)


def test_op():
    pixels = torch.from_numpy(pixels_of(random.Random(0), 50, 40, 3).copy())
    assert_opcheck(torch.ops.evakernels.resize, (pixels, (7, 9), (0, 0, 40, 50), (0, 0, 7, 9), 2, False, True, None))
    compiled = torch.compile(lambda image: resize(image, (7, 9)) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(pixels), resize(pixels, (7, 9)) + 1)


RGB = torch.zeros(4, 6, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "argument", "call"),
    [
        (TypeError, "image", lambda: resize(RGB.float(), (2, 2))),
        (TypeError, "image", lambda: resize(np.zeros((4, 6, 3)), (2, 2))),
        (TypeError, "image .* mode P", lambda: resize(Image.new("P", (4, 4)), (2, 2))),
        (TypeError, "image .* a list", lambda: resize([[1]], (2, 2))),
        (ValueError, "image", lambda: resize(RGB[0], (2, 2))),
        (ValueError, "image", lambda: resize(RGB[:0], (2, 2))),
        (ValueError, "image", lambda: resize(Image.new("RGB", (0, 3)), (2, 2))),
        (ValueError, "size", lambda: resize(RGB, (0, 2))),
        (ValueError, "size", lambda: resize(RGB, (2,))),
        (ValueError, "box", lambda: resize(RGB, (2, 2), (0, 0, 4, 6))),
        (ValueError, "box", lambda: resize(RGB, (2, 2), (3, 0, 2, 4))),
        (ValueError, "box", lambda: resize(RGB, (2, 2), (0, 0, float("nan"), 4))),
        (ValueError, "crop", lambda: resize(RGB, (2, 2), crop=(0, 0, 2, 3))),
        (ValueError, "filter .* bicubic", lambda: resize(RGB, (2, 2), filter="bicubik")),
        (ValueError, "table", lambda: resize(RGB, (2, 2), table=torch.zeros(1, 256))),
        (TypeError, "table", lambda: resize(RGB, (2, 2), table=torch.zeros(3, 256, dtype=torch.float64))),
    ],
)
def test_wrong_input(error, argument, call):
    with pytest.raises(error, match=f"^resize: {argument}"):
        call()
