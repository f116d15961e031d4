"""A step of masked image modelling, gradient by gradient, against the papers written out in float64."""

from collections.abc import Iterator

import pytest
import torch
from plain_masked_image import plain_features, plain_loss
from plain_vision import turn_exactly
from small_options import OPTIONS
from torch import Tensor, nn

from evaclip.data.masks import BlockMasks
from evaclip.factory import create_masked_image_model, create_model
from evaclip.model.config import Savings
from evaclip.model.masked_image import MaskedImageModel
from evaclip.train.config import MaskedImageTask, OptimConfig
from evaclip.train.distributed import World
from evaclip.train.optimizer import build_optimizer, parameter_groups
from evaclip.train.step import StepOptions, TrainStep
from evaclip.train.tasks.masked_image import MaskedImage
from evaclip.train.tasks.teacher import Teacher

SMALL = {"width": 24, "heads": 2, "layers": 2, "image_size": 32, "patch_size": 8}
TEACHER = {**OPTIONS, "vision": {**OPTIONS["vision"], "image_size": 32, "patch_size": 8}}


def stirred(model: nn.Module, seed: int) -> nn.Module:
    """No parameter has its start value, and all matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.double().named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * values if "norm" in name and name.endswith("weight") else 0.3 * values)
    turn_exactly(model)
    return model


def batch(samples: int = 5, count: int = 6) -> tuple[Tensor, Tensor]:
    images = torch.randn(samples, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    masks = BlockMasks((4, 4), count / 16, smallest=2)
    return images, torch.stack([torch.from_numpy(masks(seed)) for seed in range(samples)])


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("name", "layers", "recompute"),
    [
        ("eva02_base_patch14_224", 0, "none"),
        ("eva02_tiny_patch14_224", 0, "block"),
        ("eva02_tiny_patch14_224", 1, "none"),
    ],
    ids=["as EVA-02 B", "as EVA-02 Ti", "masked patches dropped"],
)
def test_every_gradient_is_that_of_the_papers(name: str, layers: int, recompute: str, accumulation: int) -> None:
    savings = Savings(recompute=recompute)  # type: ignore[arg-type]
    student = create_masked_image_model(name, 16, decoder_layers=layers, patch_gradient=0.1, savings=savings, **SMALL)
    tower = create_model("tiny", **TEACHER).visual
    stirred(student, 1), stirred(tower, 2)
    images, masked = batch()

    state, config = named(student), student.config
    expected = plain_loss(state, config, images, masked, plain_features(named(tower), tower.config, images).detach())
    expected.backward()

    teacher = Teacher(tower, student.preprocess, student.preprocess)
    task = MaskedImage(student, teacher, MaskedImageTask(name="masked_image"))
    optim = OptimConfig(lr=0.0)
    optimizer = build_optimizer(parameter_groups(student, task.towers, optim), optim)
    step = TrainStep(task, optimizer, StepOptions(accumulation=accumulation), World(torch.device("cpu")))
    result = step(images, masked, step=0)

    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-12, atol=0)
    assert -1 < expected < 1
    assert not {"head.weight", "head.bias"} & state.keys()
    for key, parameter in student.named_parameters():
        gradient = state[key].grad
        assert gradient is not None, key
        assert gradient.abs().max() > 1e-9, key
        if key.startswith("patch_embed."):
            gradient = 0.1 * gradient
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-11, msg=key)
    assert all(parameter.grad is None for parameter in tower.parameters())


@pytest.mark.parametrize("layers", [0, 1])
def test_pixels_of_masked_patches_change_nothing(layers: int) -> None:
    student = create_masked_image_model("eva02_tiny_patch14_224", 16, decoder_layers=layers, **SMALL)
    stirred(student, 1)
    images, masked = batch()
    other = images.clone()
    for image, patches in zip(other, masked.tolist(), strict=True):
        for patch in patches:
            row, column = 8 * (patch // 4), 8 * (patch % 4)
            image[:, row : row + 8, column : column + 8] += 5
    with torch.no_grad():
        assert torch.equal(student(other, masked), student(images, masked))
        assert not torch.equal(student(other), student(images))


def kinds(model: MaskedImageModel) -> Iterator[tuple[str, nn.Linear]]:
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize("name", ["eva02_base_patch14_224", "eva02_small_patch14_224"])
def test_start_values_are_those_of_eva02(name: str) -> None:
    torch.manual_seed(0)
    model = create_masked_image_model(name, 64, width=128, heads=2, layers=3)
    scaled = 3 if "base" in name else 0
    for key, layer in kinds(model):
        fan_out, fan_in = layer.weight.shape
        if not scaled and key.endswith((".w1", ".w2")):
            fan_out *= 2
        expected = (2 / (fan_in + fan_out)) ** 0.5
        if scaled and key.endswith((".w1", ".w2", ".w3", "attn.proj", "attn.v_proj")):
            expected *= torch.tensor(6.0).log().sqrt().item()
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.04), key
        assert layer.bias is None or not layer.bias.any()
    kernel = model.patch_embed.proj.weight
    bound = (6 / (3 * 14**2 + 128)) ** 0.5
    assert 0.99 * bound < kernel.abs().max() <= bound
    assert kernel.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    for parameter in (model.cls_token, model.pos_embed, model.mask_token):
        assert 0.019 < parameter.abs().max() <= 0.02001
        assert parameter.std().item() == pytest.approx(0.54 * 0.02, rel=0.2)
