"""Fine-tuning of classifiers: one step against the formulas, a run that learns, recipes, timm's augmentation."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from image_files import write_class_folders
from PIL import Image, ImageOps
from plain_vision import plain_vision, turn_exactly
from small_tasks import CLASSIFIER
from timm.data.transforms_factory import create_transform
from torch import Tensor
from trained_runs import checkpoint, column, evaluations

from evaclip import create_vision_model
from evaclip.augmentation import Augmentation
from evaclip.commands.main import main
from evaclip.data import Batch
from evaclip.errors import UserError
from evaclip.eval.classify import ClassSpace
from evaclip.model.config import Preprocess
from evaclip.model.vision_model import VisionModel
from evaclip.model.vision_names import RELEASES
from evaclip.report import write_report
from evaclip.train import rng
from evaclip.train.build import build
from evaclip.train.config import ClassificationTask, OptimConfig, TowerConfig, TrainConfig
from evaclip.train.distributed import World
from evaclip.train.optimizer import build_optimizer, parameter_groups
from evaclip.train.recipes import RECIPES, get_recipe
from evaclip.train.step import StepOptions, TrainStep
from evaclip.train.tasks.classification import Classification, classes_for
from evaclip.train.timm_data import Mixing, TimmTransform
from evaclip.train.trainer import train
from evaclip.transforms import Normalization
from evaclip.weights import to_timm

NAME = "eva02_base_patch14_448"
ALONE = World(torch.device("cpu"))
CLASSES = 5
BATCH = 8
STEP = 3
LR, DECAY, LAYER_DECAY, EPS = 1e-2, 0.3, 0.5, 1e-8


def small_classifier(**options: Any) -> VisionModel:
    """In float64, without a parameter that has its start value."""
    torch.manual_seed(0)
    model = create_vision_model(NAME, num_classes=CLASSES, **{**CLASSIFIER, **options}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    turn_exactly(model)
    return model


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def step_of(model: VisionModel, config: ClassificationTask, accumulation: int = 1) -> TrainStep:
    task = Classification(model, config, ClassSpace.whole("abcde"), seed=7)
    optim = OptimConfig(lr=LR, beta2=0.999, eps=EPS, weight_decay=DECAY, visual=TowerConfig(layer_decay=LAYER_DECAY))
    optimizer = build_optimizer(parameter_groups(model, task.towers, optim), optim)
    return TrainStep(task, optimizer, StepOptions(accumulation_steps=accumulation), ALONE)


def expected_loss(state: dict[str, Tensor], model: VisionModel, config: ClassificationTask) -> Tensor:
    """The tower's equations, mixed labels written out as a matrix, and cross-entropy."""
    images, labels = batch()
    targets = torch.full((BATCH, CLASSES), config.label_smoothing / CLASSES, dtype=torch.float64)
    targets[range(BATCH), labels] += 1 - config.label_smoothing
    if config.mixup or config.cutmix:
        images, shares = Mixing(config, 7)(images, STEP, 0)
        own = shares.double()[:, None]
        neighbours = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
        targets = own * targets + (1 - own) * targets[neighbours]
    logits = plain_vision(state, model.config, images)
    logarithms = logits - logits.exp().sum(1, keepdim=True).log()
    return -(targets * logarithms).sum() / BATCH


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.8}, {"mixup": 0.8, "cutmix": 1.0, "mix_mode": "elem"}])
def test_one_step_equals_the_formulas(mixing: dict[str, Any], accumulation: int) -> None:
    """Loss, each gradient, and each weight behind AdamW with rates that fall with depth (BEiT, Bao et al. 2021)."""
    model, config = small_classifier(), ClassificationTask(label_smoothing=0.2, **mixing)
    before = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    loss = expected_loss(before, model, config)
    loss.backward()
    images, labels = batch()
    result = step_of(model, config, accumulation)(Batch([images], labels), STEP)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-10, atol=0)
    for name, parameter in model.named_parameters():
        gradient = before[name].grad
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12, msg=name)
        top, *inner = name.split(".")
        embedding = top in ("cls_token", "pos_embed", "patch_embed")
        depth = int(inner[0]) + 1 if top == "blocks" else 0 if embedding else 3
        rate = LR * LAYER_DECAY ** (3 - depth)
        decay = 0.0 if parameter.ndim == 1 or top in ("cls_token", "pos_embed") else DECAY
        moved = before[name] - rate * (gradient / (gradient.abs() + EPS) + decay * before[name])
        torch.testing.assert_close(parameter.detach(), moved.detach(), rtol=1e-7, atol=1e-9, msg=name)


COLORS = {"dark_red": (150, 0, 0), "green": (0, 150, 0), "sky_blue": (0, 0, 150)}


@pytest.mark.slow
def test_a_run_learns_and_its_weights_come_back(run_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    data = write_class_folders(tmp_path / "train", COLORS, 12)
    config = run_config(
        f"data.train={data}",
        f"eval.sets.val.data.train={write_class_folders(tmp_path / 'val', COLORS, 3)}",
        "data.augmentation.scale=[0.5,1.0]", "task.auto_augment=rand-m3", "schedule.steps=30", "optim.lr=0.01",
        "batch_size=12", "ema_decay=0.9", "task.classes=[sky blue, dark red, green]", task="classification",
    )  # fmt: skip
    run = train(config).folder
    assert evaluations(run)[30]["val/top1"] == 1.0
    assert np.mean(column(run, "accuracy")[-5:]) > 0.7
    described = json.loads((checkpoint(run, 30) / "model.json").read_text())
    options = {name: value for name, value in described.items() if name in CLASSIFIER}
    model = create_vision_model(NAME, pretrained=run, **options).eval()
    assert model.num_classes == described["num_classes"] == 3
    peer = timm.create_model(
        NAME, num_classes=3, img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2,
        ref_feat_shape=(16, 16),
    ).eval()  # fmt: skip
    peer.load_state_dict(to_timm(model.state_dict()))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(images), peer(images), rtol=1e-4, atol=1e-4)
    # The command measures the run as the run did, and its report has it.
    assert main(["eval", "classify", str(run), "--data", str(tmp_path / "val"), "--workers", "0"]) == 0
    found = json.loads(next((run / "evaluations").iterdir()).read_text())
    assert found["model"]["origin"] == str(checkpoint(run, 30) / "ema.safetensors")
    assert (found["metrics"]["top1"], found["metrics"]["samples"]) == (1.0, 9)
    assert "classification" in write_report(run).read_text()


@pytest.mark.parametrize(
    ("given", "folders", "names"),
    [
        (3, True, ("dark red", "green", "sky blue")),
        (7, False, tuple("0123456")),
        (("a", "b", "c"), True, ("a", "b", "c")),
    ],
)
def test_classes(given: Any, folders: bool, names: tuple[str, ...], run_config: Any, tmp_path: Path) -> None:
    data = write_class_folders(tmp_path / "data", COLORS, 1) if folders else tmp_path / "rows.csv"
    (tmp_path / "rows.csv").touch()
    (tmp_path / "data" / "no_pictures").mkdir(parents=True)
    config = run_config(f"data.train={data}", f"task.classes={json.dumps(given)}", task="classification")
    classes = classes_for(config)
    assert classes.names == names
    assert classes.labels(["1", "sky blue"] if folders else ["1", "2"]).tolist() == [1, 2]


def test_a_locked_model_trains_its_classifier(run_config: Callable[..., TrainConfig]) -> None:
    model = build(run_config("model.lock_image=true", task="classification"), ALONE).model
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["batch_size=7"], "batch_size=7 is not a multiple of 2, the samples that are mixed"),
        (["batch_size=6", "accumulation_steps=4"], r"batch_size=6 is less than 2 samples for each of 4 micro-batches"),
        (["data.augmentation.rotation=5"], "data.augmentation.rotation is not used in classification"),
        (["task.auto_augment=rand-q1"], "task.auto_augment='rand-q1' is not a policy of timm"),
        (["task.classes=3"], "task.classes must be null or 64"),
        (["eval.sets.val={data: {train: synthetic}, metrics: [loss]}"], "eval.sets.val.metrics must be classify"),
        (
            ["eval.sets.val={data: {train: synthetic}, classes: [a, b]}"],
            "eval.sets.val.classes must be the classifier.s 64",
        ),
        (["data={train: x.csv}"], "task.classes must be"),
    ],
)
def test_mistakes(assignments: list[str], message: str, run_config: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text("filepath,title\nx.png,y\n" * 9)
    with pytest.raises(UserError, match=message):
        build(run_config(*assignments, task="classification"), ALONE)


FINE_TUNINGS = [name for name in RECIPES if name.startswith("finetune-")]


@pytest.mark.parametrize("name", FINE_TUNINGS)
def test_fine_tuning_recipe_fits_its_release(name: str) -> None:
    """By the authors' commands: AdamW, a cosine to 0, RandAugment, and neither mixing nor erasing."""
    config = get_recipe(name)
    task, optim, schedule = config.task, config.optim, config.schedule
    assert (optim.name, optim.beta1, optim.beta2, optim.eps) == ("adamw", 0.9, 0.999, 1e-8)
    assert (optim.weight_decay, optim.grad_clip_norm) == (0.05, None)
    assert (schedule.name, schedule.final_factor) == ("cosine", 0.0)
    assert (task.auto_augment, task.mixup, task.cutmix, task.random_erasing) == ("rand-m9-mstd0.5-inc1", 0, 0, 0)
    model, _, tag = config.model.name.partition(".")
    assert task.classes == RELEASES[model][tag].num_classes
    assert (config.data.augmentation.scale[0], config.ema_decay) == (
        (0.2, None) if task.classes > 1000 else (0.08, 0.9999)
    )
    start, _, tag = str(config.model.pretrained_image).removeprefix("hf-hub:timm/").partition(".")
    assert tag in RELEASES[start]
    # A model by whose name a recipe is found, too.
    assert get_recipe(config.model.name) == config


def test_released_classifiers_have_recipes() -> None:
    kinds = ("clip_ft", "mim_in22k_ft", "mim_m38m_ft")
    released = {f"{model}.{tag}" for model, tags in RELEASES.items() for tag in tags if tag.startswith(kinds)}
    assert {RECIPES[name]().model.name for name in FINE_TUNINGS} == released


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


def test_posterize_to_no_bits_is_black(picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow 13 refuses 0 bits, which timm draws at the highest magnitude."""
    posterize = ImageOps.posterize

    def posterize_as_pillow_13(image: Image.Image, bits: int) -> Image.Image:
        if not 1 <= bits <= 8:
            raise ValueError("bits must be between 1 and 8")
        return posterize(image, bits)

    monkeypatch.setattr(ImageOps, "posterize", posterize_as_pillow_13)
    augment = transform(auto_augment="rand-m10-n1-inc1")
    assert any(not augment(picture, seed).any() for seed in range(120))


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
    """Labels are mixed in proportion to the pixels (Yun et al. 2019, equation 1)."""
    images, rows = pictures(), torch.arange(8)
    found, shares = mixed(cutmix=1.0, mix_mode="elem")
    neighbours, own = images[rows ^ 1], (found == images).all(1)
    assert torch.equal(torch.where(own[:, None], images, neighbours), found)
    for others, share in zip(~own, shares, strict=True):
        assert others.sum() == others.any(0).sum() * others.any(1).sum()
        assert share == pytest.approx(1 - others.double().mean().item(), abs=1e-6)
    assert len(set(shares.tolist())) > 4


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_parts_of_a_batch_are_mixed_as_the_whole(mode: Any) -> None:
    whole = mixed(mixup=0.8, cutmix=1.0, mix_mode=mode)
    mixing = Mixing(ClassificationTask(mixup=0.8, cutmix=1.0, mix_mode=mode), 3)
    parts = [mixing(pictures()[first : first + 2], 0, first) for first in range(0, 8, 2)]
    for found, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(found), expected)
