"""A step of masked image modelling, gradient by gradient, against the papers written out in float64.

EVA (arXiv 2211.07636, section 2): block-wise masked patches become a learned token, the loss is the negative cosine of
a linear layer behind the last norm and the CLIP features of the masked patches. EVA-02 (arXiv 2303.11331, section 2):
SwiGLU, a norm inside the MLP, two-dimensional rotary positions, Xavier's start values, no norm inside attention.
Masked autoencoders (arXiv 2111.06377, section 3): the encoder sees the visible patches alone.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from plain_vision import plain_angles, plain_blocks, plain_norm, plain_patches, plain_tokens, turn_exactly
from small_tasks import OPTIONS
from torch import Tensor, nn

from evaclip.data import Batch
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
    step = TrainStep(task, optimizer, StepOptions(accumulation_steps=accumulation), World(torch.device("cpu")))
    result = step(Batch([images], masked), step=0)

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


def plain_loss(student, config, images, masked, features):
    """Mean over all masked patches `masked` [B, K] of the batch; `features` [B, patches, width] are the teacher's."""
    rows = torch.arange(len(images))[:, None]
    tokens = (_dropping if "decoder_norm.weight" in student else _replacing)(student, config, images, masked)
    predicted = F.linear(tokens[:, 1:][rows, masked], student["lm_head.weight"], student["lm_head.bias"])
    wanted = features[rows, masked]
    return -((predicted * wanted).sum(-1) / (predicted.norm(dim=-1) * wanted.norm(dim=-1))).mean()


def plain_features(tower, config, images):
    """Each patch of a CLIP's image tower, behind the last norm and the projection, `[B, patches, embed_dim]`."""
    tokens = plain_tokens(tower, plain_patches(tower, config, images))
    tokens = plain_norm(tower, "norm", config, plain_blocks(tower, config, tokens, _angles(config, images)))
    return F.linear(tokens, tower["head.weight"], tower["head.bias"])[:, 1:]


def _angles(config, images):
    return plain_angles(config).expand(len(images), -1, -1)


def _replacing(state, config, images, masked):
    patches = plain_patches(state, config, images)
    is_masked = torch.zeros(patches.shape[:2], dtype=torch.bool).scatter(1, masked, True)
    tokens = plain_tokens(state, torch.where(is_masked[..., None], state["mask_token"], patches))
    return plain_norm(state, "norm", config, plain_blocks(state, config, tokens, _angles(config, images)))


def _dropping(state, config, images, masked):
    rows, angles = torch.arange(len(images))[:, None], _angles(config, images)
    visible = torch.stack([torch.tensor([i for i in range(config.num_patches) if i not in m]) for m in masked.tolist()])
    tokens = plain_tokens(state, plain_patches(state, config, images))
    tokens = torch.cat([tokens[:, :1], tokens[:, 1:][rows, visible]], 1)
    seen = plain_norm(state, "norm", config, plain_blocks(state, config, tokens, angles[rows, visible]))
    every = (state["mask_token"] + state["pos_embed"][:, 1:]).expand(len(images), -1, -1)
    every = torch.cat([seen[:, :1], every.index_put((rows, visible), seen[:, 1:])], 1)
    return plain_norm(state, "decoder_norm", config, plain_blocks(state, config, every, angles, "decoder_blocks"))
