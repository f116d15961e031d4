"""Models here against open_clip's, with the same random weights; every option against plain PyTorch."""

import functools
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from plain_vision import plain_vision
from small_models import NO_ROPE, random_images, random_tokens, small_model, stir, without_start_values
from torch import nn

from evaclip import CLIP, CLIPConfig, create_model, get_config, get_tokenizer
from evaclip.model.config import override
from evaclip.weights import load_weights, to_open_clip

TEXTS = ["a photo of a cat", "", "two dogs & a very, very long sentence " * 12, "straße 123"]


def _peer(name: str, layers: int | None, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """open_clip's model, of reduced depth if asked, with stirred weights."""
    config = open_clip.get_model_config(name)
    config.pop("custom_text")
    if layers is not None:
        config["text_cfg"]["layers"] = layers
        monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=layers))
    with without_start_values():
        model = open_clip.CustomTextCLIP(**config).eval()
    stir(model, std=0.02)
    return model


def _same(name: str, layers: int | None) -> CLIPConfig:
    options = {} if layers is None else {"vision": {"layers": layers}, "text": {"layers": layers}}
    return override(get_config(name), options)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        pytest.param("EVA02-B-16", None, marks=pytest.mark.slow),
        ("EVA02-L-14", 2),
        ("EVA02-L-14-336", 1),
        ("EVA01-g-14", 2),
        pytest.param("EVA02-E-14", 2, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    ],
)
def test_features_match_open_clip(name: str, layers: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = _peer(name, layers, monkeypatch)
    model = _loaded(_same(name, layers), peer)
    images = random_images(1, model.config.vision.image_size)
    tokens = get_tokenizer(name)(TEXTS)
    with torch.no_grad():
        for ours, theirs in (
            (model.encode_image(images), peer.encode_image(images)),
            (model.encode_text(tokens), peer.encode_text(tokens)),
        ):
            assert theirs.std() > 0.01
            assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(F.normalize(ours), F.normalize(theirs), atol=1e-5, rtol=0)


def _loaded(config: CLIPConfig, peer: nn.Module) -> CLIP:
    with torch.device("meta"):
        model = CLIP(config)
    model.to_empty(device="cpu").eval()
    state = peer.state_dict()
    load_weights(model, state)
    back = to_open_clip(model.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    return model


def test_gradients_match_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = _peer("EVA02-B-16", 2, monkeypatch)
    model = _loaded(_same("EVA02-B-16", 2), peer)
    images, tokens = random_images(2, 224), get_tokenizer("EVA02-B-16")(TEXTS[:2])
    outputs = [m(images, tokens) for m in (peer, model)]
    for theirs, ours in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6)
    for image, text, scale in outputs:
        (scale * image @ text.T).log_softmax(-1).diagonal().sum().backward()
    gradients = to_open_clip({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, parameter in peer.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-5, rtol=1e-3)


def test_initialization_std() -> None:
    model = create_model("EVA02-CLIP-B-16", vision={"layers": 4}, text={"layers": 2})
    state = model.state_dict()
    width, layers = 512, 2
    expected = {
        "visual.pos_embed": 0.02,
        "visual.blocks.0.attn.q_proj.weight": 0.02,
        "visual.blocks.0.attn.proj.weight": 0.02 / 2**0.5,
        "visual.blocks.3.mlp.w3.weight": 0.02 / 8**0.5,
        "visual.head.weight": 2e-5,
        "text.token_embedding.weight": 0.02,
        "text.positional_embedding": 0.01,
        "text.text_projection": width**-0.5,
        "text.transformer.resblocks.1.attn.in_proj_weight": width**-0.5,
        "text.transformer.resblocks.1.attn.out_proj.weight": (2 * layers * width) ** -0.5,
        "text.transformer.resblocks.1.mlp.c_proj.weight": (2 * layers * width) ** -0.5,
        "text.transformer.resblocks.1.mlp.c_fc.weight": (2 * width) ** -0.5,
    }
    for name, std in expected.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.03), name
    assert model.logit_scale.item() == pytest.approx(2.65926, abs=1e-5)
    for name, tensor in state.items():
        if name.endswith("bias") and "patch_embed" not in name:
            assert not tensor.any(), name
        if "norm" in name and name.endswith("weight"):
            assert (tensor == 1).all(), name
    state = create_model("EVA01-CLIP-B-16", vision={"layers": 1}, text={"layers": 1}).state_dict()
    assert all((state[f"visual.blocks.0.gamma_{number}"] == 0.1).all() for number in (1, 2))


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


def test_wrong_images_and_tokens() -> None:
    model = small_model()
    for images, error in ((torch.zeros(2, 3, 32, 31), ValueError), (torch.zeros(2, 3, 32, 32).byte(), TypeError)):
        with pytest.raises(error, match="images"):
            model.encode_image(images)
    for tokens, error in ((torch.zeros(2, 17).long(), ValueError), (torch.zeros(2, 16), TypeError)):
        with pytest.raises(error, match="tokens"):
            model.encode_text(tokens)
