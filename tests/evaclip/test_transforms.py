"""Transforms against open_clip's, and that randomness comes from the seed alone."""

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from image_files import as_file
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

from evaclip import Augmentation, Preprocess, eval_transform, train_transform, transforms
from evaclip.data import BadSample, FaultKind
from evaclip.data.samples import decode_image
from evaclip.errors import UserError
from evaclip.pixels import pixel_kind
from evaclip.transforms import EvalTransform, NativeSize, Normalization, PackedTransform, TrainTransform, native_size

SIZES = [(300, 200), (48, 224), (224, 224), (37, 500)]
MODES = ["RGB", "L", "CMYK", "P", "1", "RGBA"]
STRONG = Augmentation(
    scale=(0.3, 1.0), flip=0.5, rotation=20, translation=0.1, zoom=(0.8, 1.2), brightness=0.4, contrast=0.4,
    saturation=0.4, hue=0.1, grayscale=0.3,
)  # fmt: skip
PLAIN = Preprocess(mean=(0, 0, 0), std=(1, 1, 1))


def _picture(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _as_loaded(image: Image.Image) -> Image.Image:
    """As EVA-CLIP's loader of shards decodes a palette or single bits, in which Pillow can't interpolate."""
    return image.convert("RGB") if image.mode in ("P", "1") else image


def drawing(size: int = 64) -> Image.Image:
    """A red square in the middle of nothing."""
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (size // 4, size // 4, 3 * size // 4, 3 * size // 4))
    return image


@pytest.mark.parametrize("mode", MODES)
def test_levels_normalised_later_are_bit_exact(mode: str) -> None:
    preprocess = Preprocess(mean=(0.5, 0.1, 0.7), std=(0.3, 0.25, 0.9))
    transform = TrainTransform((32, 48), preprocess, STRONG)
    for seed in range(4):
        image = _picture((90, 70), mode, seed)
        levels = transforms.levels_of(transform, preprocess)(image, seed)
        assert (levels.dtype, levels.shape) == (torch.uint8, (3, 32, 48))
        assert torch.equal(transforms.Normalization(preprocess)(levels), transform(image, seed))
    whole = EvalTransform((32, 48), preprocess)
    levels = transforms.levels_of(whole, preprocess)(image)
    assert (levels.dtype, levels.shape) == (torch.uint8, (3, 32, 48))
    assert torch.equal(transforms.Normalization(preprocess)(levels), whole(image))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES[:3])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_eval_transform_matches_open_clip(mode: str, size: tuple[int, int], resize: str) -> None:
    image = _picture(size, mode)
    ours = eval_transform(112, resize=resize)(image)
    assert ours.shape == (3, 112, 112)
    assert torch.equal(ours, image_transform(112, is_train=False, resize_mode=resize)(_as_loaded(image)))


@pytest.mark.parametrize("size", [(216, 459), (504, 585), (88, 429), (48, 114), (90, 70)])
def test_eval_transform_oblong_matches_open_clip(size: tuple[int, int]) -> None:
    """The first ones end between two pixels, where a last bit decides."""
    image, shape = _picture(size), (336, 196) if size == (216, 459) else (112, 196)
    theirs = image_transform(shape, is_train=False)(image)
    assert torch.equal(transforms.EvalTransform(shape)(image), theirs)


@pytest.mark.parametrize("size", [(1, 3001), (901, 2)])
def test_very_flat_image_is_cropped_first(size: tuple[int, int], monkeypatch: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = image_transform(32, is_train=False)(Image.fromarray(pixels))
    resize, seen = transforms.resize, []
    monkeypatch.setattr(
        transforms, "resize", lambda image, shape, **options: seen.append(shape) or resize(image, shape, **options)
    )
    torch.testing.assert_close(EvalTransform(32)(Image.fromarray(pixels)), expected, rtol=0, atol=0.02)
    assert max(seen[0]) <= 101 * 32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_train_transform_matches_open_clip(mode: str, size: tuple[int, int]) -> None:
    image, theirs, ours = _picture(size, mode), image_transform(64, is_train=True), train_transform(64)
    for seed in range(5):
        torch.manual_seed(seed)
        assert torch.equal(ours(image, seed), theirs(_as_loaded(image)))


@pytest.mark.parametrize("augmentation", [Augmentation(), STRONG])
def test_train_transform_depends_on_the_seed_only(augmentation: Augmentation) -> None:
    image, transform = _picture((80, 60)), train_transform(32, augmentation=augmentation)
    alone = [transform(image, seed) for seed in range(24)]
    state = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: transform(image, seed), range(24)))
    sent = pickle.loads(pickle.dumps(transform))
    torch.manual_seed(99)
    for seed, expected in enumerate(alone):
        assert torch.equal(together[seed], expected)
        assert torch.equal(sent(image, seed), expected)
    torch.set_rng_state(state)
    transform(image, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tensor.numpy().tobytes() for tensor in alone}) > 12


@pytest.mark.parametrize("budget", [1, 2, 7, 196, 256])
@pytest.mark.parametrize("size", [(480, 640), (640, 427), (224, 224), (5, 7), (1, 300), (900, 1), (1080, 1920)])
def test_native_size_matches_siglip2(size: tuple[int, int], budget: int) -> None:
    found = native_size(*size, patch=16, max_patches=budget)
    assert found == get_image_size_for_max_num_patches(*size, 16, budget)
    rows, columns = (side // 16 for side in found)
    assert 1 <= rows * columns <= budget
    assert found == (16 * rows, 16 * columns)


def test_native_size_at_the_limits() -> None:
    """Flat, square, and ratios at which both sides need another patch at once."""
    assert native_size(1, 10**9, 14, 196) == (14, 196 * 14)
    assert native_size(10**9, 1, 14, 196) == (196 * 14, 14)
    for side in (1, 224, 65_500):
        assert native_size(side, side, 16, 255) == (240, 240)
        assert native_size(side, side, 16, 256) == (256, 256)
    assert native_size(100, 200, 16, 8) == native_size(1, 2, 16, 8) == (32, 64)
    assert native_size(100, 200, 16, 7) == (32, 48)


@pytest.mark.parametrize("name", ["height", "width", "patch", "max_patches"])
def test_native_size_refuses_zero(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        native_size(**({"height": 8, "width": 8, "patch": 4, "max_patches": 4} | {name: 0}))


def test_native_transform_resizes_the_whole_image() -> None:
    image = _picture((200, 50))
    pixels = EvalTransform(NativeSize(8, 64), PLAIN)(image)
    assert torch.equal(pixels, F.to_tensor(image.resize((128, 32), Image.Resampling.BICUBIC)))


def test_native_crop_keeps_the_aspect_ratio() -> None:
    """The crop has 0.5 to 1 of the image's area, and 3/4 to 4/3 of its width / height."""
    transform = TrainTransform(NativeSize(4, 256), PLAIN, Augmentation(scale=(0.5, 1.0), flip=0.5))
    for size in ((300, 75), (75, 300)):
        shapes = [transform.levels(_picture(size), seed).shape for seed in range(40)]
        assert len(set(shapes)) > 3
        for _, height, width in shapes:
            assert 0.6 < width / height / (size[0] / size[1]) < 1.6
            assert height * width <= 256 * 4 * 4


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_packed_levels_normalised_later_are_bit_exact(dropout: float) -> None:
    preprocess, image = Preprocess(mean=(0.5, 0.1, 0.7), std=(0.3, 0.25, 0.9)), _picture((90, 70))
    transform = PackedTransform(TrainTransform(NativeSize(4, 30), preprocess, STRONG), 4, dropout)
    levels = transforms.levels_of(transform, preprocess)(image, 3)
    assert levels.patches.dtype == torch.uint8
    expected, found = transform(image, 3), Normalization(preprocess)(levels)
    assert torch.equal(found.patches, expected.patches)
    assert torch.equal(found.positions, expected.positions)
    assert len(found.patches) == int(found.sizes.prod() * (1 - dropout))
    images = [transform(image, seed) for seed in range(6)]
    sizes, places = ({str(getattr(each, name).tolist()) for each in images} for name in ("sizes", "positions"))
    assert len(sizes) < 6
    assert len(places) == (6 if dropout else len(sizes))


def test_transparent_image_lies_on_white() -> None:
    for transform in (eval_transform(64, PLAIN.mean, PLAIN.std), TrainTransform(64, PLAIN)):
        tensor = transform(drawing())
        assert tensor[:, 0, 0].tolist() == [1, 1, 1]
        assert tensor[:, 32, 32].tolist() == [1, 0, 0]


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.6, 0.99])
@pytest.mark.parametrize(("field", "center"), [("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0)])
def test_colour_changes_match_torchvision(field: str, center: int, draw: float) -> None:
    image, options = _picture((50, 40)), Augmentation(**{field: 0.4})
    expected = getattr(F, f"adjust_{field}")(image, center - 0.4 + 0.8 * draw)
    # The grayscale behind them isn't asked for, and draws nothing.
    assert np.array_equal(TrainTransform(32, PLAIN, options).recolored(image, iter([draw])), expected)


@pytest.mark.parametrize("draws", [(0.5, 0.5, 0.5, 0.0), (0.1, 0.8, 0.3, 1.0), (0.9, 0.2, 0.6, 0.4)])
def test_affine_change_matches_torchvision(draws: tuple[float, ...]) -> None:
    image, options = _picture((50, 40)), Augmentation(rotation=30, translation=0.2, zoom=(0.6, 1.3))
    angle, right, down, zoom = (
        low + (high - low) * draw
        for (low, high), draw in zip(((-30, 30), (-10, 10), (-10, 10), (0.6, 1.3)), draws, strict=True)
    )
    shift = [round(right), round(down)]
    expected = F.affine(image, angle, shift, zoom, [0.0], InterpolationMode.BILINEAR, [10, 20, 30])
    assert np.array_equal(transforms._move(image, options, (10, 20, 30), iter(draws)), expected)


def test_some_images_are_mirrored_or_grey() -> None:
    image = _picture((40, 30))
    gray = train_transform(16, PLAIN.mean, PLAIN.std, augmentation=Augmentation(grayscale=1.0))(image, 0)
    assert torch.equal(gray[0], gray[2])
    plain, mirrored, either = (train_transform(16, augmentation=Augmentation(flip=share)) for share in (0.0, 1.0, 0.5))
    found = []
    for seed in range(40):
        expected = plain(image, seed)
        assert torch.equal(mirrored(image, seed), expected.flip(2))
        found.append(torch.equal(either(image, seed), expected))
        assert found[-1] or torch.equal(either(image, seed), expected.flip(2))
    assert 10 < sum(found) < 30


def test_augmentation_wrong_option_is_named() -> None:
    for options in ({"scale": (0.9, 0.5)}, {"scale": (0.5, 1.2)}, {"ratio": (0, 1)}, {"hue": 0.6}):
        with pytest.raises(UserError, match=f"augmentation.{next(iter(options))}"):
            Augmentation(**options)  # type: ignore[arg-type]


RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    ("values", "kind", "name"),
    [
        (RAMP.astype(np.uint16), "png", "16-bit"),
        (RAMP.astype(">u2"), "tiff", "16-bit"),
        (RAMP.astype(np.int32), "tiff", "integer"),
        ((RAMP / 65535).astype(np.float32), "tiff", "float"),
        (RAMP.astype(np.float32), "tiff", "float"),
    ],
)
def test_deep_image_is_scaled_to_bytes(values: np.ndarray, kind: str, name: str) -> None:
    data = as_file(Image.fromarray(values), kind)
    raw = Image.open(io.BytesIO(data))
    assert pixel_kind(raw) == name
    decoded = decode_image(data, "x")
    assert decoded.mode == "L"
    assert np.abs(np.asarray(decoded) - RAMP / 257).max() <= 1
    plain = PLAIN.mean, PLAIN.std
    for tensor in (eval_transform(64, *plain)(raw), train_transform(64, *plain, scale=(1, 1))(raw, 0)):
        assert tensor.mean().item() == pytest.approx(0.5, abs=0.02)
        assert tensor[:, -1, -1].min() > 0.97
        assert tensor[:, 0, 0].max() < 0.03


def test_crop_takes_the_range_of_the_whole_image() -> None:
    """A float picture of 0..255, of which a part lies within 0..1."""
    values = np.zeros((64, 64), np.float32)
    values[0, 0] = 255
    values[32:] = 1
    tensor = train_transform(64, PLAIN.mean, PLAIN.std, scale=(0.5, 0.5))(Image.fromarray(values), 1)
    assert tensor[:, -1].max() < 0.01


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0, 70000]], np.int32), "integer pixels from 0 to 70000"),
        (np.array([[-0.5, 0.5]], np.float32), "float pixels from -0.5 to 0.5; accepted: 0..1 or 0..255 or 0..65535"),
        (np.array([[0.5, np.nan]], np.float32), "float pixels from nan to nan"),
    ],
)
def test_unknown_pixel_range_is_a_bad_sample(values: np.ndarray, reason: str) -> None:
    with pytest.raises(BadSample, match=reason) as caught:
        decode_image(as_file(Image.fromarray(values), "tiff"), "shard:key")
    assert caught.value.fault.kind is FaultKind.UNKNOWN_RANGE
    assert caught.value.fault.name == "shard:key"


def test_deep_transparent_value_stays_transparent() -> None:
    values = np.full((8, 8), 30000, np.uint16)
    values[2:6, 2:6] = 514
    image = Image.open(io.BytesIO(as_file(Image.fromarray(values), "png", transparency=30000)))
    tensor = eval_transform(8, PLAIN.mean, PLAIN.std)(image)
    assert tensor[:, 0, 0].tolist() == [1, 1, 1]
    assert torch.equal(tensor[:, 4, 4], torch.full((3,), np.float32(2 / 255).item()))
