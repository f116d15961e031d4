"""Transforms against open_clip's, and that randomness comes from the seed alone."""

import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from evaclip import Augmentation, Preprocess, eval_transform, train_transform, transforms
from evaclip.errors import UserError
from evaclip.transforms import EvalTransform, TrainTransform, crop_box

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
def test_levels_normalised_later_are_the_same_bits(mode: str) -> None:
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
    every = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, 2)
    later = transforms.Normalization(preprocess)(torch.from_numpy(every).permute(2, 0, 1))
    expected = (torch.arange(256) / 255 - torch.tensor(preprocess.mean)[:, None]) / torch.tensor(preprocess.std)[
        :, None
    ]
    assert torch.equal(later.squeeze(2), expected)


def test_levels_of_other_transforms() -> None:
    class Noisy(TrainTransform):
        def __call__(self, image: Image.Image, seed: int | None = None) -> torch.Tensor:
            return super().__call__(image, seed) + 1

    class Recoloured(TrainTransform):
        def recolored(self, image: Image.Image, draws: object) -> Image.Image:
            return image.convert("L")

    def own(image: Image.Image, seed: int) -> torch.Tensor:
        return torch.zeros(3, 8, 8)

    for transform in (Noisy(8), TrainTransform(8, PLAIN), EvalTransform(8, PLAIN), own):
        assert transforms.levels_of(transform, Preprocess()) is transform
    levels = transforms.levels_of(Recoloured(8), Preprocess())(_picture((9, 9)), 0)
    assert levels.dtype == torch.uint8
    assert torch.equal(levels[0], levels[2])
    values = torch.rand(3, 8, 8)
    assert transforms.Normalization(PLAIN)(values) is values


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_evaluation_gives_the_bits_of_open_clip(mode: str, size: tuple[int, int], resize: str) -> None:
    image = _picture(size, mode)
    ours = eval_transform(112, resize=resize)(image)
    assert ours.shape == (3, 112, 112)
    assert torch.equal(ours, image_transform(112, is_train=False, resize_mode=resize)(_as_loaded(image)))


@pytest.mark.parametrize("size", [(216, 459), (504, 585), (88, 429), (48, 114), (90, 70)])
def test_rectangular_sizes_equal_open_clip(size: tuple[int, int]) -> None:
    """The first ones end between two pixels, where a last bit decides."""
    image, shape = _picture(size), (336, 196) if size == (216, 459) else (112, 196)
    theirs = image_transform(shape, is_train=False)(image)
    assert torch.equal(transforms.EvalTransform(shape)(image), theirs)


@pytest.mark.parametrize("size", [(1, 3001), (901, 2)])
def test_very_flat_images_are_cropped_first(size: tuple[int, int], monkeypatch: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = image_transform(32, is_train=False)(Image.fromarray(pixels))
    resized, seen = transforms._resize, []
    monkeypatch.setattr(
        transforms, "_resize", lambda image, shape, how: seen.append(shape) or resized(image, shape, how)
    )
    torch.testing.assert_close(EvalTransform(32)(Image.fromarray(pixels)), expected, rtol=0, atol=0.02)
    assert max(seen[0]) <= 101 * 32


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_options_reach_the_transform(interpolation: str) -> None:
    image, mean, std = _picture((90, 70)), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    theirs = image_transform(48, is_train=False, mean=mean, std=std, interpolation=interpolation)
    assert torch.equal(eval_transform(48, mean, std, interpolation=interpolation)(image), theirs(image))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_training_gives_the_bits_of_open_clip(mode: str, size: tuple[int, int]) -> None:
    image, theirs, ours = _picture(size, mode), image_transform(64, is_train=True), train_transform(64)
    for seed in range(5):
        torch.manual_seed(seed)
        assert torch.equal(ours(image, seed), theirs(_as_loaded(image)))


@pytest.mark.parametrize(("width", "height"), [(100, 80), (10, 400), (400, 10), (1, 1), (90, 120)])
def test_crop_boxes_are_those_of_torchvision(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height))
    for seed in range(20):
        scale, ratio = (0.2, 1.0), (0.5, 1.9)
        ours = crop_box(height, width, scale, ratio, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        assert ours == tuple(RandomResizedCrop.get_params(image, list(scale), list(ratio)))


@pytest.mark.parametrize("augmentation", [Augmentation(), STRONG])
def test_result_is_a_function_of_the_seed(augmentation: Augmentation) -> None:
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


def test_without_a_seed_torch_decides() -> None:
    image, transform = _picture((80, 60)), train_transform(32, scale=(0.2, 0.5))
    torch.manual_seed(3)
    first = transform(image)
    second = transform(image)
    torch.manual_seed(3)
    assert torch.equal(transform(image), first)
    assert not torch.equal(first, second)


def test_transparent_pictures_lie_on_white() -> None:
    for transform in (eval_transform(64, PLAIN.mean, PLAIN.std), TrainTransform(64, PLAIN)):
        tensor = transform(drawing())
        assert tensor[:, 0, 0].tolist() == [1, 1, 1]
        assert tensor[:, 32, 32].tolist() == [1, 0, 0]


def test_transparent_palette_lies_on_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 0, 255, 0])
    image.info["transparency"] = 0
    assert (eval_transform(8, PLAIN.mean, PLAIN.std)(image) == 1).all()


@pytest.mark.parametrize(
    "field", ["rotation", "translation", "zoom", "brightness", "contrast", "saturation", "hue", "grayscale"]
)
def test_each_option_has_an_effect_of_its_own(field: str) -> None:
    values = {"rotation": 20.0, "zoom": (0.7, 0.8), "grayscale": 1.0}
    still = Augmentation(scale=(1, 1), ratio=(1, 1))
    image = _picture((40, 40))
    plain = TrainTransform(32, PLAIN, still)(image, 5)
    changed = TrainTransform(32, PLAIN, dataclasses.replace(still, **{field: values.get(field, 0.3)}))(image, 5)
    assert not torch.equal(changed, plain)
    if field == "grayscale":
        assert torch.equal(changed[0], changed[1])
    if field in ("rotation", "translation", "zoom"):
        assert changed[:, 0, 0].tolist() == [1, 1, 1] or changed[:, -1, -1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.6, 0.99])
@pytest.mark.parametrize(("field", "center"), [("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0)])
def test_colours_change_as_torchvision_changes_them(field: str, center: int, draw: float) -> None:
    image, options = _picture((50, 40)), Augmentation(**{field: 0.4})
    expected = getattr(F, f"adjust_{field}")(image, center - 0.4 + 0.8 * draw)
    # The grayscale behind them isn't asked for, and draws nothing.
    assert np.array_equal(transforms._recolor(image, options, iter([draw])), expected)


@pytest.mark.parametrize("draws", [(0.5, 0.5, 0.5, 0.0), (0.1, 0.8, 0.3, 1.0), (0.9, 0.2, 0.6, 0.4)])
def test_pictures_move_as_torchvision_moves_them(draws: tuple[float, ...]) -> None:
    image, options = _picture((50, 40)), Augmentation(rotation=30, translation=0.2, zoom=(0.6, 1.3))
    angle, right, down, zoom = (
        low + (high - low) * draw
        for (low, high), draw in zip(((-30, 30), (-10, 10), (-10, 10), (0.6, 1.3)), draws, strict=True)
    )
    shift = [round(right), round(down)]
    expected = F.affine(image, angle, shift, zoom, [0.0], InterpolationMode.BILINEAR, [10, 20, 30])
    assert np.array_equal(transforms._move(image, options, (10, 20, 30), iter(draws)), expected)


def test_some_pictures_are_mirrored() -> None:
    image = _picture((40, 30))
    plain, mirrored, either = (train_transform(16, augmentation=Augmentation(flip=share)) for share in (0.0, 1.0, 0.5))
    found = []
    for seed in range(40):
        expected = plain(image, seed)
        assert torch.equal(mirrored(image, seed), expected.flip(2))
        found.append(torch.equal(either(image, seed), expected))
        assert found[-1] or torch.equal(either(image, seed), expected.flip(2))
    assert 10 < sum(found) < 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.9, 0.5)}, r"augmentation.scale is 0.9..0.5; expected 0 < smallest <= largest"),
        ({"scale": (0.5, 1.2)}, "can't exceed the image"),
        ({"ratio": (0, 1)}, "augmentation.ratio"),
        ({"hue": 0.6}, r"augmentation.hue is 0.6; expected 0..0.5"),
        ({"grayscale": -0.1}, "augmentation.grayscale"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Augmentation(**options)  # type: ignore[arg-type]


def test_description_tells_what_is_done() -> None:
    assert repr(eval_transform(32)) != repr(eval_transform(32, resize="squash"))
    assert repr(eval_transform(32)) == repr(eval_transform(32))
