"""Models, transforms and tokenizers by name, under the functions and names of open_clip and timm."""

import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_models import random_images, small_model

import evaclip
from evaclip import (
    CLIP,
    create_model,
    create_model_and_transforms,
    create_model_from_pretrained,
    create_vision_model,
    get_config,
    get_tokenizer,
)
from evaclip.errors import UserError
from evaclip.model.config import find_model
from evaclip.packing import PackedImages
from evaclip.transforms import EvalTransform
from evaclip.weights import describe_preprocess
from evaclip.weights.hub import RELEASED


def _checkpoint(folder: Path, model: CLIP) -> Path:
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "preprocess.json").write_text(json.dumps(describe_preprocess(model.config)))
    return folder


@pytest.mark.parametrize("form", ["file", "pointer", "run"])
def test_create_model_of_checkpoint(form: str, tmp_path: Path) -> None:
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize": "squash"}
    model = create_model("tiny", preprocess=preprocess).eval()
    folder = _checkpoint(tmp_path / "checkpoints" / "step_00000007", model)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000007\n")
    source = {"file": folder / "model.safetensors", "pointer": tmp_path / "checkpoints" / "latest", "run": tmp_path}[
        form
    ]
    again, train, evaluate = create_model_and_transforms("tiny", pretrained=str(source))
    assert again.config == model.config
    assert train.preprocess == evaluate.preprocess == model.config.preprocess
    assert isinstance(evaluate, EvalTransform)
    assert evaluate.size == 32
    with torch.no_grad():
        assert torch.equal(again.eval().encode_image(random_images(2)), model.encode_image(random_images(2)))


@pytest.mark.parametrize("seed", [None, 3])
def test_transforms_of_native_model_pack_images(seed: int | None) -> None:
    overrides: Any = {"preprocess": {"max_patches": 4}, "vision": {"patch_dropout": 0.5}}
    model, train, evaluate = create_model_and_transforms("tiny", **overrides)
    picture = Image.new("RGB", (60, 20))
    for images in (evaluate(picture), train(picture, seed)):
        assert isinstance(images, PackedImages)
        assert images.sizes[0, 1] > images.sizes[0, 0]
        assert model.encode_image(images).shape == (1, model.config.embed_dim)
    whole = int(images.sizes.prod())
    assert len(images.patches) == whole // 2


def test_native_image_with_new_axis_names_pack_images() -> None:
    _, _, evaluate = create_model_and_transforms("tiny", preprocess={"max_patches": 4})
    with pytest.raises(TypeError, match=r"got None; `evaclip\.pack_images`"):
        evaluate(Image.new("RGB", (60, 20)))[None]


@pytest.mark.parametrize(
    ("make", "name", "options", "overrides"),
    [
        (create_model, "tiny", {"vision": {"image_size": 64}}, {"vision": {"image_size": 48}}),
        (create_vision_model, "eva02_tiny_patch14_224", {"image_size": 56, "num_classes": 3}, {"image_size": 70}),
    ],
)
def test_create_model_as_trained(make, name, options, overrides, tmp_path, caplog):
    model = make(name, **options)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    stored = tmp_path / "model.json"
    stored.write_text(json.dumps({"name": name, **asdict(model.config)}))
    assert make(name, tmp_path).config == model.config
    assert not caplog.records
    for other, config in ((overrides, make(name, **overrides).config), ({"as_trained": False}, make(name).config)):
        assert make(name, tmp_path, **other).config == config
        assert "positions are resized from" in caplog.text
        caplog.clear()
    stored.write_text(json.dumps({"name": "another", **asdict(model.config)}))
    assert make(name, tmp_path).config == make(name).config


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_create_model_precision(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    exact = small_model()
    folder = _checkpoint(tmp_path / "step", exact)
    for pretrained in (None, folder):
        model = create_model("tiny", pretrained=pretrained, precision=precision).eval()
        assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        rough = model.encode_image(random_images(2), normalize=True)
        assert rough.dtype == dtype
        expected = exact.encode_image(random_images(2), normalize=True)
    assert (rough.float() - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name": "tinny"}, "unknown model 'tinny'; did you mean 'tiny'"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; did you mean"),
        ({"device": "gpu"}, "device 'gpu' can't be used; accepted: cpu"),
        ({"pretrained": "nowhere/at/all"}, "no weights file or checkpoint folder 'nowhere/at/all'"),
        ({"pretrained": "eva_clip"}, "tiny has no released weights"),
        ({"model_name": "EVA02-L-14", "pretrained": "merged2b_s4b"}, "did you mean 'merged2b_s4b_b131k'"),
    ],
)
def test_create_model_wrong_arguments(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(**{"model_name": "tiny", "device": "meta", **arguments})


def test_public_names_exist() -> None:
    for name in evaclip.__all__:
        assert getattr(evaclip, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
        evaclip.create_modle  # noqa: B018
    assert get_config("tiny") is evaclip.get_config("tiny")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of another image size, with averaged weights."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "latest").write_text("step_00000007\n")
    (tmp_path / "run" / "config.yaml").write_text("{}")
    model = create_model("tiny", vision={"image_size": 48, "layers": 1})
    (checkpoint / "model.json").write_text(json.dumps({"name": "tiny", **asdict(model.config)}))
    save_file(model.state_dict(), checkpoint / "model.safetensors")
    save_file({name: value + 1 for name, value in model.state_dict().items()}, checkpoint / "ema.safetensors")
    return tmp_path / "run"


@pytest.mark.parametrize("form", [".", "checkpoints/step_00000007"])
def test_create_model_of_run(form: str, run_folder: Path) -> None:
    model = create_model(str(run_folder / form))
    expected = create_model("tiny", run_folder / "checkpoints" / "step_00000007" / "ema.safetensors")
    assert model.config == expected.config
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert get_tokenizer(str(run_folder)).context_length == model.config.text.context_length
    assert create_model_from_pretrained(str(run_folder))[1].size == 48


@pytest.mark.parametrize(
    ("make", "name"), [(create_model, "EVA02-CLIP-B-16"), (create_vision_model, "eva02_tiny_patch14_224")]
)
def test_create_model_of_run_of_another_model(make, name, run_folder):
    with pytest.raises(UserError, match=f"pretrained must be weights of model {name!r}, got .* 'tiny'") as caught:
        make(name, run_folder, as_trained=False)
    assert len(str(caught.value)) < 300


# Functions, and the parameters that are passed to them by place or by name.
SHARED = {
    "create_model": ("model_name", "pretrained", "device", "precision"),
    "create_model_and_transforms": ("model_name", "pretrained", "device", "precision"),
    "create_model_from_pretrained": ("model_name", "pretrained", "device", "precision", "return_transform"),
    "get_tokenizer": ("model_name", "context_length"),
    "list_models": (),
    "list_pretrained": ("as_str",),
    "list_pretrained_tags_by_model": ("model",),
    "get_model_config": ("model_name",),
    "add_model_config": ("path",),
    "tokenize": ("texts", "context_length"),
    "decode": ("output_ids",),
    "push_to_hf_hub": (
        *("model", "tokenizer", "model_config", "repo_id", "commit_message", "token", "revision", "private"),
        *("create_pr", "model_card", "safe_serialization"),
    ),
    "build_zero_shot_classifier": (
        *("model", "tokenizer", "classnames", "templates", "num_classes_per_batch", "device", "use_tqdm"),
    ),
}
METHODS = {
    "encode_image": ("normalize",),
    "encode_text": ("normalize",),
    "get_logits": (),
    "set_grad_checkpointing": ("enable",),
    "lock_image_tower": ("unlocked_groups", "freeze_bn_stats"),
    "lock_text_tower": ("unlocked_layers", "freeze_layer_norm"),
}
BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@pytest.mark.parametrize("name", [*SHARED, *METHODS])
def test_signature_matches_open_clip(name: str) -> None:
    """Positional arguments mean the same here and there."""
    owners = (evaclip, open_clip) if name in SHARED else (evaclip.CLIP, open_clip.CLIP)
    names = (SHARED | METHODS)[name]
    ours, theirs = (inspect.signature(getattr(owner, name)).parameters for owner in owners)
    assert set(names) <= ours.keys() & theirs.keys()
    shared = [name for name in names if ours[name].kind in BY_PLACE]
    places, their_places = ([p.name for p in each.values() if p.kind in BY_PLACE] for each in (ours, theirs))
    assert [name for name in places if name in shared] == [name for name in their_places if name in shared]
    assert len(places) <= len(their_places)
    assert name in METHODS or "Example:" in getattr(evaclip, name).__doc__


@pytest.mark.parametrize("spelling", ["EVA02_CLIP_B/16", "hf-hub:timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"])
def test_find_model_in_any_spelling(spelling: str) -> None:
    assert find_model(spelling) == "EVA02-CLIP-B-16"
    assert evaclip.get_model_config(spelling)["vision"]["patch_size"] == 16
    assert evaclip.list_pretrained_tags_by_model(spelling) == ["eva_clip", "merged2b_s8b_b131k"]


def test_create_model_by_hub_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "hf-hub:timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"
    asked = []

    def find(source: str, model: str) -> Path:
        asked.append((source, model))
        return tmp_path / "none.safetensors"

    monkeypatch.setattr("evaclip.factory.find_weights", find)
    evaclip.create_model(name, device="meta")
    assert asked == [(name, "EVA02-CLIP-B-16")]


def test_list_functions() -> None:
    assert evaclip.list_pretrained() == [(model, tag) for model, tags in RELEASED.items() for tag in tags]
    assert "EVA02-CLIP-L-14:eva_clip" in evaclip.list_pretrained(as_str=True)
    assert evaclip.list_pretrained_tags_by_model("tiny") == []
    assert evaclip.list_vision_models("eva02_tiny*") == ["eva02_tiny_patch14_224", "eva02_tiny_patch14_336"]
    released = evaclip.list_vision_models(pretrained=True)
    assert "naflexvit_base_patch16_map.untrained" not in released
    with pytest.raises(UserError, match="pretrained must be a file or folder"):
        evaclip.create_vision_model("naflexvit_base_patch16_map", pretrained=True)
    assert "eva02_tiny_patch14_336.mim_in22k_ft_in1k" in released
    for name in (released[0], f"timm/{released[0]}", f"hf-hub:timm/{released[0]}"):
        evaclip.create_vision_model(name, device="meta")


def test_add_model_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaclip.model.config._added", {})
    (tmp_path / "my-clip.json").write_text(json.dumps({**evaclip.get_model_config("tiny"), "embed_dim": 32}))
    evaclip.add_model_config(tmp_path)
    assert "my-clip" in evaclip.list_models()
    assert evaclip.create_model("My_Clip").encode_image(random_images(1)).shape == (1, 32)
    (tmp_path / "my-clip.json").write_text('{"embed_dim": 16}')
    evaclip.add_model_config(tmp_path / "my-clip.json")
    assert evaclip.get_config("my-clip").embed_dim == 16


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("EVA02-B-16.json", "{}", "has the name of a shipped model"),
        ("a.json", '{"embed": 1}', "a.json' is not a model configuration: unknown model option 'embed'"),
        ("a.json", None, "No such file"),
    ],
)
def test_add_model_config_wrong_file(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        evaclip.add_model_config(tmp_path / name)


def test_create_model_open_clip_keywords(tmp_path: Path) -> None:
    torch.save(small_model().state_dict(), tmp_path / "w.pt")
    (tmp_path / "preprocess.json").write_text(json.dumps({"mean": [0.1, 0.1, 0.1], "resize": "squash"}))
    model, preprocess = evaclip.create_model_from_pretrained(
        "tiny", tmp_path / "w.pt", force_image_size=48, image_mean=(0, 0, 0), image_std=None, precision="pure_bf16"
    )
    assert not model.training
    assert model.visual.pos_embed.dtype == torch.bfloat16
    assert (preprocess.size, preprocess.preprocess.mean, preprocess.preprocess.resize) == (48, (0, 0, 0), "squash")
    alone = evaclip.create_model_from_pretrained("tiny", tmp_path / "w.pt", return_transform=False)
    assert isinstance(alone, evaclip.CLIP)
    with pytest.raises(UserError, match=r"EVA02-B-16 needs pretrained: .* it has: eva_clip, merged2b_s8b_b131k"):
        evaclip.create_model_from_pretrained("EVA02-B-16")


def test_logits_and_classifier_match_open_clip() -> None:
    model, tokenizer = small_model().eval(), evaclip.get_tokenizer("tiny")
    names, images = ["cat", "red car"], random_images(3)
    with torch.no_grad():
        logits, transposed = model.get_logits(images, tokenizer(names))
        expected = (
            model.logit_scale.exp() * model.encode_image(images, True) @ model.encode_text(tokenizer(names), True).T
        )
    torch.testing.assert_close(logits, expected)
    assert torch.equal(logits.T, transposed)
    for templates in (["a {}.", "the {}"], [lambda name: f"a {name}.", lambda name: f"the {name}"]):
        arguments = (model, tokenizer, names, templates)
        theirs = open_clip.build_zero_shot_classifier(*arguments, num_classes_per_batch=1)
        for classes in (1, None):
            ours = evaclip.build_zero_shot_classifier(*arguments, num_classes_per_batch=classes)
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="template 'a cat' lacks the placeholder"):
        evaclip.build_zero_shot_classifier(model, tokenizer, names, ["a cat"])


def test_imagenet_names_match_open_clip() -> None:
    assert list(evaclip.IMAGENET_CLASSNAMES) == list(open_clip.IMAGENET_CLASSNAMES)
    for name in ("OPENAI_IMAGENET_TEMPLATES", "SIMPLE_IMAGENET_TEMPLATES"):
        ours, theirs = getattr(evaclip, name), getattr(open_clip, name)
        assert [template("x") for template in ours] == [template("x") for template in theirs]


def test_set_grad_checkpointing() -> None:
    model = small_model()
    for enable, expected in ((True, "block"), (False, "none")):
        model.set_grad_checkpointing(enable)
        assert model.visual.savings.recompute == model.text.savings.recompute == expected


def trained(tower: torch.nn.Module) -> set[str]:
    return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}


def test_lock_towers() -> None:
    model = small_model()
    everything = trained(model.visual)
    last = model.visual.layers - 1
    model.lock_image_tower()
    assert trained(model.visual) == set()
    model.lock_image_tower(unlocked_groups=1)
    assert trained(model.visual) == {name for name in everything if name.startswith("head.")}
    model.lock_image_tower(unlocked_groups=2)
    behind = ("head.", "norm.", f"blocks.{last}.")
    assert trained(model.visual) == {name for name in everything if name.startswith(behind)}
    model.lock_image_tower(unlocked_groups=model.visual.layers + 2)
    assert trained(model.visual) == everything
    model.lock_text_tower(unlocked_layers=1)
    assert trained(model.text) == {"text_projection"}


def test_lock_unlocks_attention_pool() -> None:
    """Such a tower has no projection."""
    model = create_model(
        "tiny", embed_dim=192, vision={"width": 192, "pool": "attention", "mlp": "gelu", "sub_norm": False}
    )
    model.lock_image_tower(unlocked_groups=1)
    assert trained(model.visual) == {f"attn_pool.{name}" for name, _ in model.visual.attn_pool.named_parameters()}
