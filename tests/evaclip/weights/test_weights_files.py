"""Reading weights files, and putting them into a model all or nothing."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from evaclip import create_model, load_state_dict, load_weights
from evaclip.errors import UserError
from evaclip.weights import find_weights, read_preprocess, released, to_open_clip
from evaclip.weights.load import resize_pos_embed


def _state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return create_model("tiny").state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_files_of_every_kind(suffix: str, tmp_path: Path) -> None:
    state, path = _state(), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(to_open_clip(state), path)
    else:
        torch.save({"state_dict": to_open_clip(state), "epoch": 1}, path)
    loaded = load_state_dict(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_file_of_an_old_torch(tmp_path: Path) -> None:
    state = _state()
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_state_dict(tmp_path / "old.pt").keys() == state.keys()


def test_16_bit_weights_go_into_a_32_bit_model(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in _state().items()}
    torch.save(state, tmp_path / "half.pt")
    model = create_model("tiny")
    load_weights(model, tmp_path / "half.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.text.text_projection, state["text.text_projection"].float())


def test_a_file_of_torch_may_be_written_over_by_the_model_that_was_read_from_it(tmp_path: Path) -> None:
    path, state = tmp_path / "model.pt", _state()
    torch.save(state, path)
    model = create_model("tiny", path)
    size = path.stat().st_size
    with path.open("r+b") as file:  # in place, as torch.save
        file.write(bytes(size))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class _Stranger:
    pass


@pytest.mark.parametrize("kind", ["missing", "suffix", "code", "tensor", "cut", "cut.safetensors", "no state"])
def test_unreadable_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / (kind if kind == "cut.safetensors" else f"{kind}.pt")
    message = "can't be read as weights"
    if kind == "missing":
        message = "there is no weights file"
    elif kind == "suffix":
        path, message = tmp_path / "weights.onnx", r"expected one of \.safetensors, \.pt"
    elif kind == "code":
        torch.save({"model": _Stranger()}, path)
        message = "holds other things than tensors and plain values"
    elif kind == "tensor":
        torch.save(torch.zeros(2), path)
        message = "holds a Tensor; expected tensors by name"
    elif kind == "no state":
        torch.save({"model": 3}, path)
        message = "other things under model"
    else:
        if kind == "cut":
            torch.save(_state(), path)
        else:
            save_file(_state(), path)
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=message):
        load_state_dict(path)


@pytest.mark.parametrize("files", [{"a": 3}, {"a": ["x.safetensors"]}, {"a": "x.safetensors", "b": None}])
def test_an_index_of_what_are_no_files(files: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": files}))
    with pytest.raises(UserError, match="expected JSON with files by tensor in weight_map"):
        load_state_dict(path)


def test_every_difference_is_named_and_nothing_is_loaded() -> None:
    model = create_model("tiny")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = _state(1)
    for block in (0, 1, 2):
        del state[f"visual.blocks.{block}.norm1.weight"]
    del state["text.transformer.resblocks.1.mlp.c_fc.bias"]
    state["visual.extra"] = torch.zeros(1)
    state["text.text_projection"] = torch.zeros(3, 4)
    for block in (1, 2):  # codes of 8 bits, without what they are to be multiplied by
        state[f"visual.blocks.{block}.mlp.w1.weight"] = state[f"visual.blocks.{block}.mlp.w1.weight"].to(torch.int8)
    with pytest.raises(UserError) as caught:
        load_weights(model, state)
    assert str(caught.value) == (
        "the weights don't fit the model: missing: text.transformer.resblocks.{1}.mlp.c_fc.bias, "
        "visual.blocks.{0-2}.norm1.weight; unexpected: visual.extra; "
        "of another shape: text.text_projection [3, 4] instead of [128, 128]; "
        "no floats: visual.blocks.{1-2}.mlp.w1.weight torch.int8"
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_blocks_with_gaps_are_listed_as_ranges() -> None:
    model = create_model("tiny", device="meta", vision={"layers": 7})
    state = {n: torch.empty(t.shape) for n, t in model.state_dict().items()}
    for block in (0, 1, 3, 5, 6):
        del state[f"visual.blocks.{block}.norm2.bias"]
    with pytest.raises(UserError, match=r"missing: visual\.blocks\.\{0-1,3,5-6\}\.norm2\.bias$"):
        load_weights(model, state)


@pytest.mark.parametrize(("old", "new"), [(16, 24), (16, 14), (4, 6)])
def test_position_embedding_is_resized_without_antialiasing(old: int, new: int) -> None:
    pos_embed = torch.randn(1, 1 + old * old, 8)
    resized = resize_pos_embed(pos_embed, (new, new))
    theirs = resample_abs_pos_embed(pos_embed, [new, new], num_prefix_tokens=1, antialias=False)
    torch.testing.assert_close(resized, theirs)
    assert torch.equal(resized[:, 0], pos_embed[:, 0])
    image = pos_embed[0, 1:].T.reshape(1, 8, old, old)
    by_hand = F.interpolate(image, (new, new), mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(resized[0, 1:], by_hand)


def test_positions_of_a_wide_image_stay_in_their_places(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    wide = {"image_size": (16, 64)}  # 2 x 8 patches, as many as 4 x 4
    state = create_model("tiny", vision=wide).state_dict()
    torch.save(state, tmp_path / "wide.pt")
    model = create_model("tiny", tmp_path / "wide.pt", vision=wide)
    assert torch.equal(model.visual.pos_embed, state["visual.pos_embed"])
    assert not caplog.messages


def test_resizing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = create_model("tiny", vision={"image_size": 48})
    state = _state()
    load_weights(model, state)
    assert "positions are resized from 4x4 to 6x6 patches" in caplog.text
    assert state["visual.pos_embed"].shape == (1, 17, 128)
    assert torch.equal(model.visual.pos_embed.data, resize_pos_embed(state["visual.pos_embed"], (6, 6)))


def test_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        find_weights(tmp_path, "tiny")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000009\n")
    with pytest.raises(UserError, match=r"step_00000009' has no model\.safetensors"):
        find_weights(tmp_path, "tiny")


def test_no_preprocessing_beside_the_weights(tmp_path: Path) -> None:
    assert read_preprocess(tmp_path / "model.safetensors") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "isn't JSON"),
        ("[1]", "holds a list; expected an object"),
        ('{"men": 3}', "did you mean 'mean'"),
        ('{"mean": [null, 0.5, 0.5]}', "expected 3 numbers"),
        ('{"std": [0.5, NaN, 0.5]}', "expected 3 numbers"),
        ('{"crop": "0.9"}', "expected 0 < share <= 1"),
    ],
)
def test_damaged_preprocessing_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocess.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_preprocess(tmp_path / "model.safetensors")


def test_tags_are_those_of_open_clip() -> None:
    import open_clip

    from evaclip.model.config import ALIASES

    repositories = {file.repository for tags in released.RELEASED.values() for file in tags.values()}
    assert {alias for alias in ALIASES if "/" in alias} == repositories - {"QuanSun/EVA-CLIP"}
    for alias, name in ALIASES.items():
        if "/" in alias:
            assert alias in {file.repository for file in released.RELEASED[name].values()}
        for tag in open_clip.list_pretrained_tags_by_model(alias):
            config = open_clip.get_pretrained_cfg(alias, tag)
            assert released.RELEASED[name][tag].repository == config["hf_hub"].rstrip("/")


def test_preprocessing_is_plain_json(tmp_path: Path) -> None:
    from evaclip.weights import describe_preprocess

    config = create_model("tiny", device="meta", preprocess={"mean": (0, 0.5, 1)}).config
    (tmp_path / "preprocess.json").write_text(json.dumps(describe_preprocess(config)))
    assert json.loads((tmp_path / "preprocess.json").read_text())["image_size"] == 32
    assert read_preprocess(tmp_path / "model.safetensors") == config.preprocess
