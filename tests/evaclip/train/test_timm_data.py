"""timm's augmentation and mixing as pure functions of seeds."""

import pickle
import random
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.transforms_factory import create_transform
from torch import Tensor

from evaclip.augmentation import Augmentation
from evaclip.errors import UserError
from evaclip.model.config import Preprocess
from evaclip.train import rng
from evaclip.train.config import ClassificationTask
from evaclip.train.timm_data import Mixing, TimmTransform
from evaclip.transforms import Normalization

PREPROCESS = Preprocess()
CROP = Augmentation(scale=(0.08, 1.0))


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    return Image.fromarray(pixels)


def transform(**task: Any) -> TimmTransform:
    return TimmTransform(32, PREPROCESS, CROP, ClassificationTask(**task))


@pytest.mark.parametrize("erasing", [0.0, 1.0])
def test_a_picture_is_a_function_of_its_seed(picture: Image.Image, erasing: float) -> None:
    augment = transform(random_erasing=erasing)
    first = augment(picture, 5)
    for drawn in (random.random, np.random.rand, lambda: torch.rand(3)):
        drawn()
    assert torch.equal(augment(picture, 5), first)
    assert not torch.equal(augment(picture, 6), first)
    assert first.dtype == (torch.float32 if erasing else torch.uint8)


def test_generators_go_on_as_if_nothing_was_drawn(picture: Image.Image) -> None:
    drawn = []
    for augmented in (False, True):
        rng.seed_all(1, 0)
        if augmented:
            transform(random_erasing=0.5)(picture, 5)
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("policy", ["rand-m10-n1-inc1", "augmix-m10", "v0"])
def test_no_bits_left_are_black_with_each_pillow(picture, policy, monkeypatch):
    """Pillow 13 refuses to posterize to 0 bits, which timm draws at the highest magnitude. Workers get a copy."""
    augment = transform(auto_augment=policy)
    augment(picture, 0)
    steps, _ = pickle.loads(pickle.dumps(augment))._steps
    ops = [op for step in steps.transforms for op in chain(getattr(step, "ops", ()), *getattr(step, "policy", ()))]
    posterizing = [op for op in ops if op.name.startswith("Posterize")]
    monkeypatch.setattr(ImageOps, "posterize", lambda image, bits: 1 / 0)
    for op in posterizing:
        assert not np.asarray(op.aug_fn(picture, 0)).any()
    assert posterizing


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", None])
def test_pixels_are_those_of_timm(picture: Image.Image, policy: str | None) -> None:
    """Drawn from generators in the same state, by timm's own chain with its own normalisation."""
    chain = create_transform(
        32, is_training=True, scale=CROP.scale, ratio=CROP.ratio, auto_augment=policy, color_jitter=0.4,
        interpolation="bicubic", mean=PREPROCESS.mean, std=PREPROCESS.std, re_prob=0.0,
    )  # fmt: skip
    for seed in range(5):
        with rng.seeded(seed):
            expected = chain(picture)
        found = Normalization(PREPROCESS)(transform(auto_augment=policy)(picture, seed))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_erasing_leaves_the_rest(picture: Image.Image) -> None:
    """A rectangle of noise of 2 to 33 % of the area (Zhong et al. 2017)."""
    whole = Normalization(PREPROCESS)(transform()(picture, 5))
    changed = (transform(random_erasing=1.0)(picture, 5) != whole).all(0)
    rows, columns = changed.any(1), changed.any(0)
    assert changed.sum() == rows.sum() * columns.sum()
    assert 0.01 < changed.float().mean() < 0.4


def test_what_timm_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.augmentation.zoom is not used .* scale and ratio"):
        TimmTransform(32, PREPROCESS, Augmentation(zoom=(0.5, 1.0)), ClassificationTask())
    with pytest.raises(UserError, match="'rand-q1' is no policy of timm"):
        transform(auto_augment="rand-q1")


def pictures(rows: int = 8) -> Tensor:
    return torch.randn(rows, 3, 20, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def mixed(rows: int = 8, step: int = 0, **task: Any) -> tuple[Tensor, Tensor]:
    return Mixing(ClassificationTask(**task), 3)(pictures(rows), step, 0)


def test_mixup_is_a_convex_combination() -> None:
    """x = lam a + (1 - lam) b, and so are the labels (Zhang et al. 2018, equation 1); lam is of Beta(0.8, 0.8)."""
    images, rows = pictures(400), torch.arange(400)
    found, shares = mixed(400, mixup=0.8, mix_mode="pair")
    neighbours = images[rows ^ 1]
    lam = shares.double()[:, None, None, None]
    torch.testing.assert_close(found, lam * images + (1 - lam) * neighbours, rtol=0, atol=1e-6)
    assert torch.equal(shares, shares[rows ^ 1])
    drawn = shares[::2].double()
    assert abs(drawn.mean() - 0.5) < 0.07
    assert abs(drawn.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.02


def test_cutmix_is_a_rectangle_of_the_neighbour() -> None:
    """And the labels' share is that of the pixels (Yun et al. 2019, equation 1)."""
    images, rows = pictures(), torch.arange(8)
    found, shares = mixed(cutmix=1.0, mix_mode="elem")
    neighbours, own = images[rows ^ 1], (found == images).all(1)
    assert torch.equal(torch.where(own[:, None], images, neighbours), found)
    for others, share in zip(~own, shares, strict=True):
        assert others.sum() == others.any(0).sum() * others.any(1).sum()
        assert share == pytest.approx(1 - others.double().mean().item(), abs=1e-6)
    assert len(set(shares.tolist())) > 4


@pytest.mark.parametrize(("mode", "distinct"), [("batch", 1), ("pair", 4), ("elem", 8)])
def test_the_mode_says_what_shares_a_draw(mode: str, distinct: int) -> None:
    _, shares = mixed(mixup=0.8, mix_mode=mode)
    assert len(set(shares.tolist())) == distinct
    assert not torch.equal(mixed(mixup=0.8, mix_mode=mode, step=1)[1], shares)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_parts_of_a_batch_are_mixed_as_the_whole(mode: Any) -> None:
    whole = mixed(mixup=0.8, cutmix=1.0, mix_mode=mode)
    mixing = Mixing(ClassificationTask(mixup=0.8, cutmix=1.0, mix_mode=mode), 3)
    parts = [mixing(pictures()[first : first + 2], 0, first) for first in range(0, 8, 2)]
    for found, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(found), expected)


def test_mixing_is_as_likely_as_it_says() -> None:
    images = pictures(300)
    found, shares = mixed(300, mixup=0.8, cutmix=1.0, mix_prob=0.4, switch_prob=0.25, mix_mode="elem")
    changed = (found != images).flatten(1)
    untouched = ~changed.any(1)
    assert torch.equal(shares == 1, untouched)
    assert abs(untouched.double().mean() - 0.6) < 0.09
    cut = changed.any(1) & ~changed.all(1)
    assert abs(cut.sum() / changed.any(1).sum() - 0.25) < 0.12
