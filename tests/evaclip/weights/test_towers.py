"""Starting a CLIP model from the weights of other models."""

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import small_model
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from evaclip import CLIP, create_model
from evaclip.errors import UserError
from evaclip.weights import start_image_tower, start_text_tower, to_open_clip, to_timm

State = dict[str, Tensor]


def random_model(seed: int = 1, **vision: object) -> CLIP:
    return small_model(seed, text={"layers": 2}, layers=2, **vision)


def masked_image_layout(state: State) -> State:
    """The image tower of a model, as files of masked image modelling have it."""
    tower = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    return {**tower, "mask_token": torch.zeros(1, 1, 8), "lm_head.weight": torch.zeros(5, 8)}


@pytest.mark.parametrize("layout", [dict, to_open_clip, to_timm, masked_image_layout])
def test_start_image_tower(layout) -> None:
    source, model = random_model(1).state_dict(), random_model(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start_image_tower(model.visual, layout(source))
    for name, tensor in model.state_dict().items():
        own = not name.startswith("visual.") or name.startswith("visual.head.")
        assert torch.equal(tensor, before[name] if own else source[name]), name


def test_start_image_tower_resizes(caplog: pytest.LogCaptureFixture) -> None:
    source, model = random_model(1, image_size=28, patch_size=7), random_model(2, image_size=32, patch_size=8)
    large = random_model(3, image_size=48, patch_size=8)
    with caplog.at_level(logging.INFO, logger="evaclip"):
        start_image_tower(model.visual, source.state_dict())
        start_image_tower(large.visual, source.state_dict())
    assert "resized from 7 to 8 pixels" in caplog.text
    assert "resized from 4x4 to 6x6 patches" in caplog.text
    kernel = source.visual.patch_embed.proj.weight
    assert torch.equal(model.visual.patch_embed.proj.weight, F.interpolate(kernel, size=(8, 8), mode="bicubic"))
    assert torch.equal(model.visual.pos_embed, source.visual.pos_embed)


def test_start_tower_wrong_source_changes_nothing() -> None:
    model, source = random_model(2), random_model(1).state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {**source, "visual.blocks.1.extra": torch.zeros(1), "visual.norm.bias": torch.zeros(3)}
    with pytest.raises(UserError, match=r"image tower: unexpected: blocks\.\{1\}\.extra; of another shape: norm\.bias"):
        start_image_tower(model.visual, state)
    with pytest.raises(UserError, match="have no text tower"):
        start_text_tower(model.text, masked_image_layout(source))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_start_text_tower_of_transformers(tmp_path: Path) -> None:
    model = create_model("tiny", text={"layers": 2}).eval()
    text = model.config.text
    config = CLIPTextConfig(
        vocab_size=text.vocab_size, hidden_size=text.width, intermediate_size=4 * text.width, num_hidden_layers=2,
        num_attention_heads=text.heads, max_position_embeddings=text.context_length, hidden_act="gelu",
        layer_norm_eps=text.norm_eps,
    )  # fmt: skip
    torch.manual_seed(0)
    peer = CLIPTextModel(config).eval()
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.1)
    state = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in peer.state_dict().items()}
    state |= {"logit_scale": torch.ones(()), "vision_model.x": torch.ones(1)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    start_text_tower(model.text, tmp_path / "pytorch_model.bin")
    tokens = torch.randint(1, 400, (2, 7))
    tokens[:, -1] = text.vocab_size - 1
    with torch.no_grad():
        model.text.text_projection.copy_(torch.eye(text.width, model.config.embed_dim))
        expected = peer(tokens).last_hidden_state[:, -1]
        torch.testing.assert_close(model.encode_text(tokens)[:, : text.width], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["text.", ""])
def test_create_model_from_two_towers(prefix: str, tmp_path: Path) -> None:
    source = random_model(1)
    state = {name.replace("text.", prefix, 1): tensor for name, tensor in source.state_dict().items()}
    torch.save(masked_image_layout(state), tmp_path / "image.pt")
    torch.save({"state_dict": state}, tmp_path / "text.pt")
    towers = {"pretrained_image": tmp_path / "image.pt", "pretrained_text": tmp_path / "text.pt"}
    model = create_model("tiny", vision={"layers": 2}, text={"layers": 2}, precision="bf16", **towers)
    for name, tensor in model.state_dict().items():
        own = name.startswith("visual.head.") or name in ("text.text_projection", "logit_scale")
        assert torch.equal(tensor, source.state_dict()[name].bfloat16()) is not own, name
