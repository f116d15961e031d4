"""Reading weights files, and loading them into a model, all or nothing."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from evaclip import create_model, load_state_dict, load_weights
from evaclip.errors import UserError
from evaclip.model.config import ALIASES
from evaclip.weights import read_preprocess, to_open_clip, to_original
from evaclip.weights.hub import RELEASED


def _state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return create_model("tiny").state_dict()


@pytest.mark.parametrize("name", ["new.safetensors", "new.bin", "old.pt"])
def test_load_state_dict_of_file(name: str, tmp_path: Path) -> None:
    state, path = _state(), tmp_path / name
    if path.suffix == ".safetensors":
        save_file(to_open_clip(state), path)
    else:
        torch.save({"state_dict": to_open_clip(state)}, path, _use_new_zipfile_serialization=path.stem == "new")
    loaded = load_state_dict(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_model_survives_overwritten_torch_file(tmp_path: Path) -> None:
    path, state = tmp_path / "model.pt", _state()
    torch.save(state, path)
    model = create_model("tiny", path)
    size = path.stat().st_size
    with path.open("r+b") as file:  # in place, as torch.save
        file.write(bytes(size))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class _Unsafe:
    pass


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pt", None, "there is no weights file"),
        ("weights.onnx", None, r"expected one of \.safetensors, \.pt"),
        ("code.pt", {"model": _Unsafe()}, "holds other things than tensors and plain values"),
        ("tensor.pt", torch.zeros(2), "holds a Tensor; expected tensors by name"),
        ("cut.pt", {"a": torch.zeros(1000)}, "can't be read as weights"),
        ("cut.safetensors", {"a": torch.zeros(1000)}, "can't be read as weights"),
    ],
)
def test_load_state_dict_unreadable_file(name: str, content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(content, path)
    elif content is not None:
        torch.save(content, path)
    if path.stem == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=message):
        load_state_dict(path)


def test_load_state_dict_damaged_index(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": None}}))
    with pytest.raises(UserError, match="weight_map"):
        load_state_dict(path)


def test_load_weights_names_every_difference() -> None:
    model = create_model("tiny", vision={"layers": 7})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = create_model("tiny", vision={"layers": 7}).state_dict()
    for block in (0, 1, 3, 5, 6):
        del state[f"visual.blocks.{block}.norm1.weight"]
    del state["text.transformer.resblocks.1.mlp.c_fc.bias"]
    state["visual.extra"] = torch.zeros(1)
    state["text.text_projection"] = torch.zeros(3, 4)
    for block in (1, 2):  # codes of 8 bits, without their scales
        state[f"visual.blocks.{block}.mlp.w1.weight"] = state[f"visual.blocks.{block}.mlp.w1.weight"].to(torch.int8)
    with pytest.raises(UserError) as caught:
        load_weights(model, state)
    for part in (
        "visual.blocks.{0-1,3,5-6}.norm1.weight; unexpected: visual.extra; ",
        "of another shape: text.text_projection [3, 4] instead of [128, 128]; ",
        "no floats: visual.blocks.{1-2}.mlp.w1.weight torch.int8",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"preprocess\.json can't be read"),
        ('{"men": 3}', "did you mean 'mean'"),
        ('{"std": [0.5, NaN, 0.5]}', r"preprocess\.std"),
    ],
)
def test_read_preprocess_damaged_file(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocess.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_preprocess(tmp_path / "model.safetensors")


def test_damaged_model_options_are_refused(tmp_path: Path) -> None:
    """A model with another epsilon has the same shapes, so nothing else would notice."""
    model = create_model("tiny", vision={"norm_eps": 0.01})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    options = json.dumps({"name": "tiny", "vision": {"norm_eps": 0.01}})
    (tmp_path / "model.json").write_text(options)
    assert create_model("tiny", pretrained=tmp_path).config.vision.norm_eps == 0.01
    (tmp_path / "model.json").write_text(options[:20])
    with pytest.raises(UserError, match=r"model\.json must describe the model"):
        create_model("tiny", pretrained=tmp_path)


def test_released_tags_are_those_of_open_clip() -> None:
    repositories = {file.repository for tags in RELEASED.values() for file in tags.values()}
    assert {alias for alias in ALIASES if "/" in alias} == repositories - {"QuanSun/EVA-CLIP"}
    for alias, name in ALIASES.items():
        if "/" in alias:
            assert alias in {file.repository for file in RELEASED[name].values()}
        for tag in open_clip.list_pretrained_tags_by_model(alias):
            config = open_clip.get_pretrained_cfg(alias, tag)
            assert RELEASED[name][tag].repository == config["hf_hub"].rstrip("/")


State = dict[str, Tensor]
GELU = {"mlp": "gelu", "sub_norm": False, "rope": False}


def _flat_text(state: State) -> State:
    tables = {f"visual.{place}rope.freqs_cos": torch.zeros(16, 64) for place in ("", "blocks.0.attn.")}
    return {name.removeprefix("text."): tensor for name, tensor in {**state, **tables}.items()}


LAYOUTS: dict[str, Callable[[State], dict[str, Any]]] = {
    "open_clip": to_open_clip,
    "compiled": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in to_open_clip(state).items()},
    "compiled blocks": lambda state: {re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", name): state[name] for name in state},
    "model": lambda state: {"model": state, "epoch": 3},
    "open_clip checkpoint": lambda state: {
        "epoch": 1,
        "state_dict": {f"module.{name}": tensor for name, tensor in to_open_clip(state).items()},
    },
    "flat text and rotary tables in wrappers": lambda state: {
        "module": {f"module.{name}": tensor for name, tensor in _flat_text(state).items()}
    },
}


@pytest.mark.parametrize("vision", [{}, {**GELU, "layer_scale_init": 0.1}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_original_of_layout(layout: str, vision: dict[str, Any]) -> None:
    state = create_model("tiny", vision={"layers": 2, **vision}, text={"layers": 1}).state_dict()
    original = to_original(LAYOUTS[layout](state))
    assert original.keys() == state.keys()
    assert all(torch.equal(original[name], state[name]) for name in state)
