"""`evaclip search`, with the text tower of a small model in the store."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evaclip.commands.main import main
from evaclip.runtime import text
from evaclip.runtime.encoder import Encoder
from evaclip.runtime.store import Row, Store
from evaclip.runtime.text import TOKENS_FILE, save_text_tower, text_encoder

TEXTS = ["a red bicycle", "a cat", "snow on [a] roof <b>"]


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
    """A store of embeddings of texts, which a search for the same text finds."""
    folder = tmp_path_factory.mktemp("store")
    encoder = Encoder(loaded, device="cpu", precision="fp32")
    with Store.create(folder, {"name": "tiny", "dim": encoder.dim}) as store:
        rows = [Row(f"{n}.jpg", "00", text, {"n": n}, b"\xff\xd8") for n, text in enumerate(TEXTS)]
        store.add(encoder.texts(TEXTS).numpy(), rows)
        save_text_tower(store, loaded.model)
    return folder


def test_text_encoder_equals_model(folder, loaded):
    with Store.open(folder) as store:
        found = text_encoder(store)(["a dog", *TEXTS])
    expected = Encoder(loaded, device="cpu", precision="fp32").texts(["a dog", *TEXTS]).numpy()
    assert found == pytest.approx(expected, abs=1e-5)


def test_missing_onnxruntime_is_logged(folder, loaded, monkeypatch, caplog):
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    monkeypatch.setattr(text, "encoder_of", lambda store: Encoder(loaded, device="cpu", precision="fp32"))
    with Store.open(folder) as store:
        store.model["given"] = "tiny"
        assert text_encoder(store)(["a dog"]).shape == (1, store.dim)
    assert "install onnxruntime" in caplog.text


def test_search_command_without_torch(folder):
    code = (
        "import sys; from evaclip.commands.main import main; code = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code, "search", str(folder), TEXTS[0], "--json", "--top", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    first, _ = map(json.loads, done.stdout.splitlines())
    assert first["id"] == "0.jpg"
    assert first["score"] == pytest.approx(1, abs=1e-3)
    assert first["metadata"] == {"n": 0}


def test_search_output_escapes_names(folder, tmp_path, capsys):
    page = tmp_path / "found.html"
    assert main(["search", str(folder), TEXTS[2], "--html", str(page), "--where", "n>=1"]) == 0
    shown = capsys.readouterr().out
    assert "[a]" in shown
    assert "0.jpg" not in shown
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,/9g=") == 2
    assert "<b>" not in text


@pytest.mark.parametrize("name", ["embeddings.f32", TOKENS_FILE])
def test_search_names_damaged_file(name, folder, tmp_path, capsys):
    store = tmp_path / "store"
    shutil.copytree(folder, store)
    damages = (lambda path: path.write_bytes(b"no such thing"), Path.unlink)
    for damage in damages[: 1 if name == TOKENS_FILE else 2]:  # without its tower a store asks its model
        damage(store / name)
        assert main(["search", str(store), "x"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{store / name} can't be read: " in line


def test_search_minus_reverses_order(folder, capsys):
    assert main(["search", str(folder), "a dog", "--minus", TEXTS[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["id"] == "0.jpg"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "nothing to look for"),
        (["", "--minus", "x"], "nothing to look for"),
        (["x", "--top", "0"], "top must be"),
        (["x", "--where", "n >"], "where must be"),
        (["--image", "x.jpg"], "doesn't name the model"),
        (["x", "--html", "."], "it is a folder"),
    ],
)
def test_search_mistakes_are_one_line(folder, capsys, arguments, reason):
    assert main(["search", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
