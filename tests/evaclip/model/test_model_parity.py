"""Models here against open_clip's, with the same random weights."""

import functools

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import random_images, stir, without_start_values
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
        "visual.blocks.3.mlp.w1.weight": 0.02,
        "visual.blocks.0.attn.proj.weight": 0.02 / 2**0.5,
        "visual.blocks.3.attn.proj.weight": 0.02 / 8**0.5,
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
