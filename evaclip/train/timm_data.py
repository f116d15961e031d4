"""Augmentation and mixing of labelled images by timm, as pure functions of seeds.

timm draws from the process's own generators. Here they are seeded for each sample and each row, so that no image
depends on data workers, ranks, accumulation or earlier steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from evaclip.augmentation import Augmentation
from evaclip.errors import UserError
from evaclip.model.config import Preprocess
from evaclip.pixels import eight_bit
from evaclip.train import rng
from evaclip.train.config import ClassificationTask
from evaclip.train.micro_batch import send
from evaclip.transforms import Normalization

_CROP = ("scale", "ratio")
_MIXING = 5


@dataclass(frozen=True)
class TimmTransform:
    """PIL image of any mode and size, seed -> uint8 `[3, height, width]`, or with erasing float32, normalised.

    A random crop, a flip, and a policy such as RandAugment (Cubuk et al. 2019, arXiv 1909.13719) or else colour jitter,
    by `timm.data.create_transform`; then random erasing (Zhong et al. 2017, arXiv 1708.04896).

    Args:
        size: side of the result in pixels, or height and width.
        preprocess: of the model.
        augmentation: the crop; other options must be at their defaults.
        task: flip, policy, colour jitter and erasing.

    Raises:
        UserError: for an augmentation other than the crop, or an unknown policy.
    """

    size: int | tuple[int, int]
    preprocess: Preprocess
    augmentation: Augmentation
    task: ClassificationTask

    def __post_init__(self) -> None:
        for option in fields(Augmentation):
            if option.name not in _CROP and getattr(self.augmentation, option.name) != option.default:
                raise UserError(
                    f"data.augmentation.{option.name} is not used in classification, where timm augments: of "
                    "data.augmentation it takes scale and ratio, and see task.auto_augment and task.color_jitter"
                )
        try:
            self._steps  # noqa: B018 - timm reads the policy here
        except (AssertionError, KeyError, ValueError) as exc:
            raise UserError(f"task.auto_augment={self.task.auto_augment!r} is not a policy of timm: {exc!r}") from exc

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        augment, erase = self._steps
        with rng.seeded(seed):
            levels: Tensor = augment(eight_bit(image).convert("RGB"))
            return levels if erase is None else erase(Normalization(self.preprocess)(levels))

    @cached_property
    def _steps(self) -> tuple[Any, Any]:
        from timm.data.random_erasing import RandomErasing
        from timm.data.transforms_factory import create_transform

        task, preprocess = self.task, self.preprocess
        augment = create_transform(
            self.size,
            is_training=True,
            scale=self.augmentation.scale,
            ratio=self.augmentation.ratio,
            hflip=task.flip,
            color_jitter=task.color_jitter,
            auto_augment=task.auto_augment,
            interpolation=preprocess.interpolation,
            mean=preprocess.mean,
            std=preprocess.std,
            use_prefetcher=True,  # which leaves pixels as bytes
        )
        _keep_no_bits(augment)
        if not task.random_erasing:
            return augment, None
        return augment, RandomErasing(task.random_erasing, mode="pixel", device="cpu")


def _keep_no_bits(augment: Any) -> None:
    """Let a policy of timm's posterize to 0 bits, its strongest level: black up to Pillow 12, an error from 13 on."""
    from timm.data.auto_augment import posterize

    for policy in augment.transforms:
        for step in chain(getattr(policy, "ops", ()), *getattr(policy, "policy", ())):
            if step.aug_fn is posterize:
                step.aug_fn = partial(_posterized, posterize)


def _posterized(posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **options: Any) -> Image.Image:
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


class Mixing:
    """mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899), by timm's `Mixup`.

    timm mixes the first row of a batch with its last, which depends on the number of ranks. Here rows 2n and 2n + 1 of
    the global batch are partners. timm mixes a white and a black image, and the result weights all rows with the same
    random numbers: a function of the seed and of the step (`mix_mode: batch`), the pair (`pair`) or the row (`elem`).
    """

    def __init__(self, task: ClassificationTask, seed: int) -> None:
        from timm.data.mixup import Mixup

        self._rows_a_draw = {"batch": None, "pair": 2, "elem": 1}[task.mix_mode]
        self._seed = seed
        self._mixup = Mixup(
            task.mixup, task.cutmix, prob=task.mix_prob, switch_prob=task.switch_prob, label_smoothing=0, num_classes=2
        )

    def __call__(self, images: Tensor, step: int, first_row: int) -> tuple[Tensor, Tensor]:
        """
        Args:
            images: float `[rows, 3, height, width]`, whole pairs; they stay as they are.
            first_row: index of the first row in the global batch.

        Returns:
            the mixed images, and the weight `[rows]` in float32 of each row's own label; the partner has the rest.
        """
        rows = range(first_row, first_row + len(images))
        draws = [0 if self._rows_a_draw is None else row // self._rows_a_draw for row in rows]
        places = {draw: number for number, draw in enumerate(dict.fromkeys(draws))}
        masks, shares = zip(*(self._draw(images.shape[2:], step, draw) for draw in places), strict=True)
        which = torch.tensor([places[draw] for draw in draws])
        weights = send(torch.stack(masks), images.device).to(images.dtype)
        if len(places) > 1:  # else one weighs all rows
            weights = weights[send(which, images.device)]
        return torch.lerp(partners(images), images, weights), send(torch.stack(shares)[which], images.device)

    def _draw(self, size: torch.Size, step: int, draw: int) -> tuple[Tensor, Tensor]:
        """Weights of a row's pixels [1, height, width] and of its label, 0-D; the partner has the rest."""
        pair = torch.stack((torch.ones(1, *size), torch.zeros(1, *size)))
        with rng.seeded(self._seed, _MIXING, step, draw):
            mixed, labels = self._mixup(pair, torch.arange(2))
        return mixed[0], labels[0, 0]


def partners(rows: Tensor) -> Tensor:
    """`[rows, ...]`, rows 2n and 2n + 1 having changed places."""
    swapped: Tensor = rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return swapped
