"""Weights from a hub: huggingface_hub's own client against a server on loopback."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub, ask
from huggingface_hub import constants
from safetensors.torch import save

from evaclip import create_model, load_state_dict
from evaclip.errors import UserError
from evaclip.weights import find_weights, to_open_clip

REPOSITORY = "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k"
MODEL_FILE = "open_clip_model.safetensors"
SOURCE = f"hf-hub:{REPOSITORY}"


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return to_open_clip(create_model("tiny", vision={"layers": 1}, text={"layers": 1}).state_dict())


@pytest.fixture
def hub(hub: Hub) -> Hub:
    """A hub with one model."""
    hub.files[REPOSITORY, MODEL_FILE] = save(state())
    return hub


def disconnect(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Asks a closed port from now on; returns the client's waits between its tries."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ask(f"http://127.0.0.1:{free.getsockname()[1]}", monkeypatch)
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    return waits


@pytest.mark.parametrize(
    ("source", "model"),
    [(f"{SOURCE}/{MODEL_FILE}", "tiny"), (f"{SOURCE}@main", "tiny"), ("merged2b_s8b_b131k", "EVA02-CLIP-B-16")],
)
def test_find_weights_on_hub(hub: Hub, source: str, model: str) -> None:
    expected = create_model("tiny", vision={"layers": 1}, text={"layers": 1}).state_dict()
    assert load_state_dict(find_weights(source, model)).keys() == expected.keys()


def test_find_weights_in_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = find_weights(SOURCE, "tiny")
    downloads = [request for request in hub.requests if request[:2] == ("GET", MODEL_FILE)]
    assert len(downloads) == 1
    assert find_weights(SOURCE, "tiny") == path
    assert [request for request in hub.requests if request[:2] == ("GET", MODEL_FILE)] == downloads
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert find_weights(SOURCE, "tiny") == path
    assert len(hub.requests) == before
    with pytest.raises(UserError, match=r"can't get .* of a/b .*isn't in the cache.*give its path"):
        find_weights("hf-hub:a/b", "tiny")


def test_damaged_download_is_removed(hub: Hub) -> None:
    hub.damaged = True
    with pytest.raises(UserError, match=r"arrived damaged and was removed: its SHA-256 is \w{64}, expected \w{64}"):
        find_weights(SOURCE, "tiny")
    hub.damaged = False
    assert load_state_dict(find_weights(SOURCE, "tiny"))


def test_load_state_dict_of_several_files(hub: Hub) -> None:
    whole = state()
    names = sorted(whole)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in parts.items():
        hub.files["someone/sharded", file] = save({name: whole[name] for name in held})
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    hub.files["someone/sharded", "model.safetensors.index.json"] = json.dumps(index).encode()
    path = find_weights("hf-hub:someone/sharded", "tiny")
    loaded = to_open_clip(load_state_dict(path))
    assert loaded.keys() == whole.keys()
    assert all(torch.equal(loaded[name], whole[name]) for name in names)
    path.with_name("model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"names model-2\.safetensors, which .* doesn't have"):
        load_state_dict(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"{SOURCE}/none.pt", r"timm/eva02\S+ on the Hugging Face hub has no file none\.pt"),
        ("hf-hub:nobody/nothing", r"can't get weights of nobody/nothing .*RepositoryNotFound"),
        ("hf-hub:nothing", r"'hf-hub:nothing' isn't a name on the hub"),
        ("hf-hub:someone/notes", r"someone/notes on the hub has none of .*hf-hub:someone/notes/FILE"),
    ],
)
def test_find_weights_missing_on_hub(hub: Hub, source: str, message: str) -> None:
    hub.files["someone/notes", "README.md"] = b"nothing"
    with pytest.raises(UserError, match=message):
        find_weights(source, "tiny")


def test_find_weights_unreachable_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = disconnect(monkeypatch)
    with pytest.raises(UserError, match=r"can't get EVA02_CLIP_B_psz16_s8B\.pt of QuanSun/EVA-CLIP .*give its path"):
        create_model("EVA02-B-16", pretrained="eva_clip")
    with pytest.raises(UserError, match="can't get weights of a/b"):
        find_weights("hf-hub:a/b", "tiny")
    assert waits == []


def test_find_weights_cached_without_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = find_weights(SOURCE, "tiny")
    waits = disconnect(monkeypatch)
    assert find_weights(SOURCE, "tiny") == path
    assert not waits


def test_tag_is_preferred_to_folder(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("merged2b_s8b_b131k").mkdir()
    assert load_state_dict(find_weights("merged2b_s8b_b131k", "EVA02-CLIP-B-16"))
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        find_weights("./merged2b_s8b_b131k", "EVA02-CLIP-B-16")
