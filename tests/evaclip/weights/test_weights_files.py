"""Reading weights files, and loading them into a model, all or nothing."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from evaclip import create_model, load_state_dict, load_weights
from evaclip.errors import UserError
from evaclip.model.config import ALIASES
from evaclip.weights import describe_preprocess, find_weights, read_preprocess, to_open_clip
from evaclip.weights.hub import RELEASED
from evaclip.weights.load import resize_pos_embed


def _state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return create_model("tiny").state_dict()


@pytest.mark.parametrize("name", ["new.safetensors", "new.pt", "new.pth", "new.bin", "old.pt"])
def test_load_state_dict_of_file(name: str, tmp_path: Path) -> None:
    state, path = _state(), tmp_path / name
    if path.suffix == ".safetensors":
        save_file(to_open_clip(state), path)
    else:
        torch.save({"state_dict": to_open_clip(state)}, path, _use_new_zipfile_serialization=path.stem == "new")
    loaded = load_state_dict(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_load_weights_casts_to_model_dtype(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in _state().items()}
    torch.save(state, tmp_path / "half.pt")
    model = create_model("tiny")
    load_weights(model, tmp_path / "half.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.text.text_projection, state["text.text_projection"].float())


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
        ("no_state.pt", {"model": 3}, "other things under model"),
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


@pytest.mark.parametrize("files", [{"a": 3}, {"a": "x.safetensors", "b": None}])
def test_load_state_dict_damaged_index(files: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": files}))
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
    assert str(caught.value) == (
        "the weights don't fit the model: missing: text.transformer.resblocks.{1}.mlp.c_fc.bias, "
        "visual.blocks.{0-1,3,5-6}.norm1.weight; unexpected: visual.extra; "
        "of another shape: text.text_projection [3, 4] instead of [128, 128]; "
        "no floats: visual.blocks.{1-2}.mlp.w1.weight torch.int8"
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("old", "new"), [(16, 24), (16, 14)])
def test_resize_pos_embed_without_antialiasing(old: int, new: int) -> None:
    pos_embed = torch.randn(1, 1 + old * old, 8)
    resized = resize_pos_embed(pos_embed, (new, new))
    expected = resample_abs_pos_embed(pos_embed, [new, new], num_prefix_tokens=1, antialias=False)
    torch.testing.assert_close(resized, expected)
    assert torch.equal(resized[:, 0], pos_embed[:, 0])
    image = pos_embed[0, 1:].T.reshape(1, 8, old, old)
    torch.testing.assert_close(resized[0, 1:], F.interpolate(image, (new, new), mode="bicubic")[0].flatten(1).T)


def test_load_weights_of_wide_image(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    wide = {"image_size": (16, 64)}  # 2 x 8 patches, as many as 4 x 4
    state = create_model("tiny", vision=wide).state_dict()
    torch.save(state, tmp_path / "wide.pt")
    model = create_model("tiny", tmp_path / "wide.pt", vision=wide)
    assert torch.equal(model.visual.pos_embed, state["visual.pos_embed"])
    assert not caplog.messages


def test_load_weights_of_other_size_warns(caplog: pytest.LogCaptureFixture) -> None:
    model, state = create_model("tiny", vision={"image_size": 48}), _state()
    load_weights(model, state)
    assert "resized from 4x4 to 6x6 patches" in caplog.text
    assert state["visual.pos_embed"].shape == (1, 17, 128)
    assert torch.equal(model.visual.pos_embed.data, resize_pos_embed(state["visual.pos_embed"], (6, 6)))


def test_find_weights_in_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000009\n")
    with pytest.raises(UserError, match=r"step_00000009' has no model\.safetensors"):
        find_weights(tmp_path, "tiny")


def test_preprocess_round_trip(tmp_path: Path) -> None:
    assert read_preprocess(tmp_path / "model.safetensors") is None
    config = create_model("tiny", device="meta", preprocess={"mean": (0, 0.5, 1)}).config
    (tmp_path / "preprocess.json").write_text(json.dumps(describe_preprocess(config)))
    assert json.loads((tmp_path / "preprocess.json").read_text())["image_size"] == 32
    assert read_preprocess(tmp_path / "model.safetensors") == config.preprocess


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "isn't JSON"),
        ("[1]", "holds a list"),
        ('{"men": 3}', "did you mean 'mean'"),
        ('{"mean": [null, 0.5, 0.5]}', r"preprocess\.mean"),
        ('{"std": [0.5, NaN, 0.5]}', r"preprocess\.std"),
        ('{"crop": "0.9"}', r"preprocess\.crop"),
    ],
)
def test_read_preprocess_damaged_file(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocess.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_preprocess(tmp_path / "model.safetensors")


def test_released_tags_are_those_of_open_clip() -> None:
    repositories = {file.repository for tags in RELEASED.values() for file in tags.values()}
    assert {alias for alias in ALIASES if "/" in alias} == repositories - {"QuanSun/EVA-CLIP"}
    for alias, name in ALIASES.items():
        if "/" in alias:
            assert alias in {file.repository for file in RELEASED[name].values()}
        for tag in open_clip.list_pretrained_tags_by_model(alias):
            config = open_clip.get_pretrained_cfg(alias, tag)
            assert RELEASED[name][tag].repository == config["hf_hub"].rstrip("/")
