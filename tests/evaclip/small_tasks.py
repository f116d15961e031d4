"""Small runs of all tasks: what the trainer promises, it promises of each, and the same tests show it."""

from typing import Any, NamedTuple

OPTIONS: dict[str, Any] = {
    "embed_dim": 16,
    "vision": {"width": 16, "layers": 2, "heads": 2, "image_size": 16, "patch_size": 4},
    "text": {"width": 16, "layers": 1, "heads": 2},
}

CLASSIFIER: dict[str, Any] = OPTIONS["vision"]
"""Options of an image model of the same size."""


class SmallTask(NamedTuple):
    """A task, small enough that a step takes milliseconds.

    Attributes:
        tree: the part of a run's configuration that is the task's; data of 40 samples is there if it names none.
        patch_dropout: assignments by which steps draw random numbers that the seed and the sample's place decide.
        drop_path: and those that a process draws in turn, which so depend on the number of processes.
        metrics: some of those that the evaluation of a set named val has.
    """

    tree: dict[str, Any]
    patch_dropout: list[str]
    drop_path: list[str]
    metrics: set[str]


_CLIP = SmallTask(
    tree={"model": {"name": "tiny", "options": OPTIONS}},
    patch_dropout=["model.patch_dropout=0.5"],
    drop_path=["model.options.vision.drop_path=0.3"],
    metrics={"val/zero_shot_top1", "val/text_to_image_r5", "val/loss"},
)

_NATIVE = _CLIP._replace(
    # Crops of the square drawings have 2 x 8 to 8 x 2 patches.
    tree={**_CLIP.tree, "data": {"resize": "native", "augmentation": {"scale": [0.1, 0.5], "ratio": [0.25, 4.0]}}}
)

_CLASSIFICATION = SmallTask(
    tree={
        "task": {"name": "classification", "mixup": 0.8, "cutmix": 1.0, "mix_mode": "elem", "random_erasing": 0.5},
        "model": {"name": "eva02_base_patch14_448", "options": CLASSIFIER},
    },
    patch_dropout=["model.patch_dropout=0.5"],
    drop_path=["model.options.drop_path=0.3"],
    metrics={"val/top1", "val/top5"},
)

_MASKED_IMAGE = SmallTask(
    tree={
        "task": {"name": "masked_image", "smallest_block": 2, "teacher": {"name": "tiny", "options": OPTIONS}},
        "model": {"name": "eva02_base_patch14_224", "options": OPTIONS["vision"]},
    },
    patch_dropout=[],  # masks are drawn by seed and place in any case
    drop_path=["model.options.drop_path=0.3"],
    metrics={"val/loss"},
)

TASKS = {
    "clip": _CLIP,
    "native": _NATIVE,
    "siglip": _CLIP._replace(tree={**_CLIP.tree, "loss": {"name": "siglip"}}),
    "classification": _CLASSIFICATION,
    "masked_image": _MASKED_IMAGE,
}
