"""The image models of the EVA series against timm's, with the same random weights."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import random_images, stir, without_start_values
from torch import nn
from transformers import Siglip2Config, Siglip2Model

from evaclip import CLIP, Savings, create_model, create_vision_model, pack_images
from evaclip.errors import UserError
from evaclip.model.vision_model import VisionModel
from evaclip.model.vision_names import RELEASES, split_name, vision_config
from evaclip.weights import load_weights, to_original, to_timm

NAFLEX = [name for name in RELEASES if name.startswith("naflexvit")]
Gradients = dict[str, torch.Tensor]


def peer_of(name: str, depth: int = 2, num_classes: int = 7, **options: object) -> nn.Module:
    with without_start_values():
        model: nn.Module = timm.create_model(name, depth=depth, num_classes=num_classes, **options).eval()
    stir(model, std=0.02)
    return model


def ours(name: str, peer: nn.Module, depth: int = 2, num_classes: int = 7, **options: object) -> VisionModel:
    with without_start_values():
        model = create_vision_model(name, num_classes=num_classes, layers=depth, **options).eval()
    load_weights(model, peer.state_dict())
    return model


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] if "enormous" in name else [])
        for name in RELEASES
        if name.startswith("eva")
    ],
)
def test_outputs_and_names_match_timm(name: str) -> None:
    config, tiny = vision_config(name), "tiny" in name
    depth, side = (2, config.image_shape[0]) if tiny else (1, 8 * config.patch_size)
    peer = peer_of(name, depth, img_size=side)
    if name.startswith("eva_large"):  # the bias of k, which models here lack, changes no result
        with torch.no_grad():
            for block in peer.blocks:
                block.attn.qkv.bias[1024:2048] = 0
    model = ours(name, peer, depth, image_size=side)
    images = random_images(1, side)
    with torch.no_grad():
        for mine, theirs in (
            (model(images), peer(images)),
            (model.forward_features(images), peer.forward_features(images)),
        ):
            assert theirs.std() > 0.01
            assert (mine - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())
    state, back = peer.state_dict(), to_timm(model.state_dict(), joint_bias=name.startswith("eva_large"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_releases_match_timm() -> None:
    assert set(RELEASES) == {*timm.list_models("eva*"), *NAFLEX}
    for name in NAFLEX:
        for tag, release in RELEASES[name].items():
            theirs = timm.get_pretrained_cfg(f"{name}.{tag}")
            assert theirs.num_classes == release.num_classes
            assert theirs.input_size == (3, release.eval_size, release.eval_size)
            assert release.preprocess.mean == pytest.approx(theirs.mean)
            assert release.preprocess.std == pytest.approx(theirs.std)
            assert release.preprocess.crop == theirs.crop_pct
    for name in timm.list_pretrained("eva*"):
        model, tag = split_name(name)
        assert tag is not None
        release, theirs = RELEASES[model][tag], timm.get_pretrained_cfg(name)
        assert release.num_classes == theirs.num_classes
        assert theirs.input_size[1:] == vision_config(model).image_shape
        assert release.preprocess.mean == pytest.approx(theirs.mean)
        assert release.preprocess.std == pytest.approx(theirs.std)
        assert (release.preprocess.resize == "squash") == (theirs.crop_mode == "squash")
        assert release.preprocess.crop == theirs.crop_pct


def test_features_and_head_match_timm() -> None:
    name = "eva02_tiny_patch14_224"
    peer = peer_of(name, depth=3)
    model = ours(name, peer, depth=3)
    images = random_images(2, 224)
    with torch.no_grad():
        tokens, theirs = model.forward_features(images), peer.forward_features(images)
        for pre_logits in (False, True):
            expected = peer.forward_head(theirs, pre_logits=pre_logits)
            torch.testing.assert_close(model.forward_head(tokens, pre_logits), expected, atol=1e-5, rtol=1e-5)
        last, maps = model.forward_intermediates(images, [0, -1])
        their_last, their_maps = peer.forward_intermediates(images, indices=[0, 2])
        torch.testing.assert_close(last, their_last, atol=1e-5, rtol=1e-5)
        for mine, expected in zip(maps, their_maps, strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
        assert [m.shape for m in model.forward_intermediates(images, 2)[1]] == [(2, 192, 16, 16)] * 2
    with pytest.raises(UserError, match="indices"):
        model.forward_intermediates(images, [3])


@pytest.mark.parametrize("antialias", [False, True])
def test_packed_images_match_timm_naflex(antialias: bool) -> None:
    name, grids = "eva02_tiny_patch14_224", ((8, 8), (4, 12), (10, 5))
    # timm resizes positions with antialiasing by default, unlike the authors.
    peer = peer_of(name, use_naflex=True, pos_embed_antialias=antialias)
    model = ours(name, peer, pos_antialias=antialias)
    images = [torch.randn(3, 14 * rows, 14 * columns) for rows, columns in grids]
    with torch.no_grad():
        expected = torch.cat([peer(image.unsqueeze(0)) for image in images])
        torch.testing.assert_close(model(pack_images(images, 14)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAFLEX)
def test_naflexvit_matches_timm(name: str, tmp_path: Path) -> None:
    """Logits by 1e-5, packed and of another `image_size`; gradients within three times timm's error in float32."""
    peer = timm.create_model(name, depth=2, num_classes=7, embed_dim=64, num_heads=2).eval()
    stir(peer, std=0.1)
    torch.save(peer.state_dict(), tmp_path / "weights.pt")
    model = create_vision_model(name, pretrained=tmp_path / "weights.pt", layers=2, width=64, heads=2).eval()
    torch.manual_seed(1)
    images = [torch.randn(3, 16 * rows, 16 * columns) for rows, columns in ((16, 16), (8, 20), (3, 5), (18, 12))]

    def compute(model: nn.Module, *batches: Any) -> tuple[torch.Tensor, Gradients]:
        model.zero_grad()
        logits = torch.cat([model(batch) for batch in batches])
        logits.log_softmax(1)[:, 0].sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return logits.detach(), gradients

    logits, gradients = compute(model, pack_images(images, 16))
    expected, usual = compute(peer, *(image.unsqueeze(0) for image in images))
    _, exact = compute(peer.double(), *(image.unsqueeze(0).double() for image in images))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    # Prefix tokens have no positions in timm, and some models no biases on q and v.
    prefix, known = model.config.prefix_tokens, to_original(exact)
    parameters = {n: g[:, prefix:] if n == "pos_embed" else g for n, g in gradients.items() if known[n].any()}
    known, rough = ({**each, "pos_embed": each["pos_embed"][:, prefix:]} for each in (known, to_original(usual)))
    assert_gradients(parameters, known, rough)
    size = {"image_size": (128, 320), "layers": 2, "width": 64, "heads": 2}
    resized = create_vision_model(name, pretrained=tmp_path / "weights.pt", **size).eval()
    torch.testing.assert_close(resized(images[1].unsqueeze(0))[0], expected[1], atol=1e-5, rtol=1e-5)


def assert_gradients(found: Gradients, exact: Gradients, usual: Gradients) -> None:
    """Errors are at most three times as large as those of `usual`, or rounding."""
    for name, gradient in found.items():
        errors = [(each - exact[name]).norm().item() for each in (gradient, usual[name])]
        assert errors[0] <= 3 * errors[1] + 1e-6 * exact[name].norm().item(), name


def test_siglip2_matches_transformers(tmp_path: Path) -> None:
    """Logits by 1e-5, gradients of the sigmoid loss within three times transformers' error in float32.

    SigLIP 2 of a fixed size has a convolution as its patch embedding.
    """
    peer, model = siglip2(tmp_path)
    name = "vision_model.embeddings.patch_embedding.weight"
    kernel = peer.state_dict()[name].unflatten(1, (4, 4, 3)).permute(0, 3, 1, 2)
    loaded = to_original({**peer.state_dict(), name: kernel})
    assert torch.equal(loaded["visual.patch_embed.proj.weight"], model.visual.patch_embed.proj.weight)
    torch.manual_seed(1)
    tokens = torch.randint(0, 400, (4, 12))
    images = [torch.randn(3, 4 * rows, 4 * columns) for rows, columns in ((4, 4), (2, 6), (5, 2), (1, 3))]
    packed = pack_images(images, 4)
    inputs = {"input_ids": tokens, "spatial_shapes": packed.sizes, "return_loss": True}
    pixels = [p.unflatten(1, (3, 16)).mT.flatten(1) for p in packed.patches.split(packed.lengths.tolist())]
    inputs["pixel_values"] = nn.utils.rnn.pad_sequence(pixels, batch_first=True)
    inputs["pixel_attention_mask"] = (torch.arange(packed.max_length) < packed.lengths.unsqueeze(1)).int()
    usual = peer(**inputs)
    usual.loss.backward()
    found = {name: p.grad.clone() for name, p in peer.named_parameters()}
    peer.zero_grad()
    peer.double()(**{**inputs, "pixel_values": inputs["pixel_values"].double()}).loss.backward()
    logits, _ = model.get_logits(packed, tokens)
    torch.testing.assert_close(logits, usual.logits_per_image, atol=1e-5, rtol=1e-5)
    signs = 2 * torch.eye(4) - 1
    nn.functional.softplus(-signs * logits).sum(1).mean().backward()
    exact = to_original({name: p.grad for name, p in peer.named_parameters()})
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == exact.keys()
    assert_gradients(gradients, exact, to_original(found))
    model.set_savings(Savings(pooled_last_block=False))
    torch.testing.assert_close(model.encode_text(tokens, normalize=True), usual.text_embeds, atol=1e-5, rtol=1e-5)


def siglip2(folder: Path) -> tuple[Any, CLIP]:
    """A small SigLIP 2 of transformers, and ours with its weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 49408, "max_position_embeddings": 12}
    peer = Siglip2Model(
        Siglip2Config(text_config=text, vision_config={**sizes, "patch_size": 4, "num_patches": 16})
    ).eval()
    stir(peer, std=0.1)
    peer.save_pretrained(folder)
    options: dict[str, Any] = {"width": 64, "layers": 2, "heads": 2, "mlp_ratio": 1.5}
    model = create_model(
        "SigLIP2-B-16-NaFlex",
        f"local-dir:{folder}",
        embed_dim=64,
        vision={**options, "image_size": 16, "patch_size": 4},
        text={**options, "vocab_size": 49408, "context_length": 12, "hf_tokenizer_name": None},
    )
    return peer, model.eval()


def test_lock_follows_classifier() -> None:
    """The last group is the classifier, or without one the attention pooling."""
    model = create_vision_model("naflexvit_base_patch16_map", num_classes=0, device="meta", layers=1)
    for num_classes, last in ((5, {"head"}), (0, {"attn_pool"}), (5, {"head"})):
        model.reset_classifier(num_classes)
        model.lock(1)
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == last


def test_oblong_images_match_timm() -> None:
    """Positions are resized as the authors did; rotary tables are those of the new grid."""
    name, shape = "eva02_tiny_patch14_224", (112, 196)
    peer = peer_of(name, img_size=shape)
    model = ours(name, peer, image_size=shape)
    images = torch.randn(2, 3, *shape)
    with torch.no_grad():
        torch.testing.assert_close(model(images), peer(images), atol=1e-5, rtol=1e-5)
    square = peer_of(name)
    load_weights(model, square.state_dict())
    resized = timm.layers.resample_abs_pos_embed(square.pos_embed, [8, 14], num_prefix_tokens=1, antialias=False)
    torch.testing.assert_close(model.pos_embed, resized)
    with pytest.raises(ValueError, match=r"\[batch, 3, 112, 196\]"):
        model(random_images(1, 224))
    with pytest.raises(UserError, match=r"image_size .* got \(112, 0\)"):
        create_vision_model(name, image_size=(112, 0))


def test_classifier_and_preprocessing_of_weights(tmp_path: Path) -> None:
    name, file = "eva02_tiny_patch14_336.mim_in22k_ft_in1k", tmp_path / "weights.pt"
    peer = peer_of("eva02_tiny_patch14_336", depth=1, num_classes=10)
    torch.save(peer.state_dict(), file)
    (tmp_path / "preprocess.json").write_text('{"image_size": 336, "crop": 0.7, "resize": "squash"}')
    model = create_vision_model(name, pretrained=file, layers=1)
    assert model.num_classes == 10
    assert torch.equal(model.head.weight, peer.head.weight)
    assert (model.preprocess.crop, model.preprocess.resize) == (0.7, "squash")
    peer.reset_classifier(0)
    torch.save(peer.state_dict(), file)
    with pytest.raises(UserError, match="missing: head"):
        create_vision_model(name, pretrained=file, layers=1)


@pytest.mark.parametrize("kind", ["masked image modelling", "CLIP", "classifier"])
def test_start_from_other_weights(kind: str, tmp_path: Path) -> None:
    name, options = "eva02_tiny_patch14_336", {"layers": 1, "image_size": 28}
    source = create_vision_model(name, num_classes=5, **options)
    stir(source)
    state, file = source.state_dict(), tmp_path / "weights.pt"
    bare = {name.replace("fc_norm", "norm"): t for name, t in state.items() if not name.startswith("head.")}
    layouts = {
        "masked image modelling": {**bare, "mask_token": torch.zeros(1, 1, 192), "lm_head.weight": torch.zeros(9, 192)},
        "CLIP": {
            **{f"visual.{name}": t for name, t in bare.items()},
            "visual.head.weight": torch.ones(5, 192),
            "text.token_embedding.weight": torch.zeros(9, 8),
            "logit_scale": torch.zeros(()),
        },
        "classifier": state,
    }
    torch.save(layouts[kind], file)
    for how in ({"pretrained_image": file}, {"pretrained": file}):
        found = create_vision_model(name, num_classes=5, **how, **options)
        for key, value in found.state_dict().items():
            kept = kind == "classifier" and "pretrained" in how
            assert torch.equal(value, state[key]) == (kept or not key.startswith("head.")), key
    assert create_vision_model(name, pretrained=file, num_classes=3, **options).head.weight.shape == (3, 192)
    with pytest.raises(UserError, match="give either pretrained, for the whole model, or pretrained_image"):
        create_vision_model(name, pretrained=file, pretrained_image=file)


def test_create_vision_model_wrong_arguments() -> None:
    with pytest.raises(UserError, match="did you mean 'eva02_base_patch14_224'"):
        create_vision_model("eva02_base_patch14_225")
    with pytest.raises(UserError, match="unknown tag of eva02_base_patch14_448 'mim'"):
        create_vision_model("eva02_base_patch14_448.mim")
    with pytest.raises(UserError, match="pool must be 'mean'"):
        create_vision_model("eva02_tiny_patch14_224", device="meta").reset_classifier(3, "token")
