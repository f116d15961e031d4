"""Every option of the vision tower, and the text tower's pooling, against plain PyTorch."""

from typing import Any

import pytest
import torch
from plain_vision import plain_vision
from small_models import NO_ROPE, random_images, random_tokens, small_model
from torch import nn

from evaclip import CLIP
from evaclip.model.norm import Norm

OPTIONS: dict[str, dict[str, Any]] = {
    "eva02": {},
    "eva02-other-grid": {"image_size": 40, "pt_hw_seq_len": 7, "rope_theta": 100.0},
    "eva01": NO_ROPE,
    "eva01-layer-scale": {**NO_ROPE, "layer_scale_init": 0.1},
    "enormous": {**NO_ROPE, "post_norm": True, "layer_scale_init": 0.3},
    "8B": {**NO_ROPE, "norm": "rms_norm", "qkv_bias": False},
    "18B": {**NO_ROPE, "norm": "rms_norm", "qkv_bias": False, "post_norm": True},
    "rope-alone": {**NO_ROPE, "rope": True, "mlp": "swiglu"},
}


def _check(model: CLIP, token_index: torch.Tensor | None = None) -> None:
    config = model.config.vision
    images = random_images(3, config.image_size)
    with torch.no_grad():
        expected = plain_vision(model.visual.state_dict(), config, images, token_index)
        actual = model.encode_image(images, token_index=token_index)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_vision_tower_matches_plain_torch(name: str) -> None:
    """With all patches and with some."""
    model = small_model(**OPTIONS[name])
    _check(model)
    generator = torch.Generator().manual_seed(3)
    _check(model, torch.stack([torch.randperm(16, generator=generator)[:7] for _ in range(3)]))


class _Adapted(nn.Module):
    """A linear layer with an adapter of low rank (LoRA)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = (torch.randn(width, 2) / 8 for width in (layer.in_features, layer.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapted: torch.Tensor = self.layer(x) + x @ self.down @ self.up.T
        return adapted


@pytest.mark.parametrize("name", ["eva02", "eva01", "8B"])
def test_adapter_on_every_linear_layer(name: str) -> None:
    model, merged = small_model(**OPTIONS[name]), small_model(**OPTIONS[name])
    torch.manual_seed(0)
    for tower in ("visual.blocks", "text.transformer.resblocks"):
        layers = [path for path, m in model.get_submodule(tower).named_modules() if isinstance(m, nn.Linear)]
        for path in (f"{tower}.{layer}" for layer in layers):
            adapted = _Adapted(model.get_submodule(path))
            model.set_submodule(path, adapted)
            merged.get_submodule(path).weight.data += adapted.up @ adapted.down.T
    images, tokens = random_images(3, model.config.vision.image_size), random_tokens(3)
    for found, expected in zip(model(images, tokens)[:2], merged(images, tokens)[:2], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_eps_of_norms() -> None:
    model = small_model()
    assert {m.eps for m in model.visual.modules() if isinstance(m, Norm)} == {1e-6}
    assert {m.eps for m in model.text.modules() if isinstance(m, Norm)} == {1e-5}
    assert {m.mlp.ffn_ln.eps for m in model.visual.blocks} == {1e-6}


def test_text_ignores_padding() -> None:
    model, tokens = small_model(), random_tokens(4)
    other = tokens.clone()
    ends = tokens.argmax(dim=-1)
    for row, end in enumerate(ends.tolist()):
        other[row, end + 1 :] = 5
    with torch.no_grad():
        first, second = model.encode_text(tokens), model.encode_text(other)
        shorter = model.encode_text(tokens[:, : int(ends.max()) + 1])
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    torch.testing.assert_close(first, shorter, atol=1e-6, rtol=1e-5)


def test_text_pools_first_end_token() -> None:
    model, tokens = small_model(), random_tokens(2)
    tokens[:, 3] = 49407
    changed = tokens.clone()
    changed[:, 4:] = 49407
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens), model.encode_text(changed), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 32, 31), ValueError, r"images must have shape \[batch, 3, 32, 32\], got \(2, 3, 32, 31\)"),
        (torch.zeros(3, 32, 32), ValueError, "images"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "torch.uint8"),
    ],
)
def test_wrong_images(images: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_model().encode_image(images)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(2, 17, dtype=torch.int64), ValueError, r"tokens must have shape \[batch, 1..16\], got \(2, 17\)"),
        (torch.zeros(16, dtype=torch.int64), ValueError, "tokens"),
        (torch.zeros(2, 16), TypeError, "torch.float32"),
    ],
)
def test_wrong_tokens(tokens: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_model().encode_text(tokens)
