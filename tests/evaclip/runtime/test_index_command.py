"""`evaclip index` on the command line."""

import tarfile

import numpy as np
import pytest
from safetensors.torch import save_file

from evaclip.commands.main import main
from evaclip.runtime.encoder import Encoder
from evaclip.runtime.store import Store
from evaclip.runtime.text import encoder_of


@pytest.fixture(scope="module")
def model(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(loaded.model.state_dict(), path)
    return f"tiny:{path}"


@pytest.fixture
def folder(pictures, tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(root / f"{number}.png")
    (root / "broken.jpg").write_bytes(b"no picture")
    return root


def test_index_command_adds_new_images(model, folder, pictures, tmp_path, capsys, monkeypatch):
    store = tmp_path / "a.store"
    assert main(["index", str(store), "--images", str(folder), "--model", model, "--precision", "fp32"]) == 0
    out = capsys.readouterr().out
    assert "7 embedded, 0 unchanged, 1 unreadable" in out
    assert f"corrupt image: {folder / 'broken.jpg'}" in out
    pictures[0].save(folder / "new.png")
    monkeypatch.chdir(tmp_path)  # a name of the same data from elsewhere, by the store's own model
    assert main(["index", "a.store", "--images", "pictures", "--precision", "fp32"]) == 0
    assert "1 embedded, 7 unchanged, 1 unreadable" in capsys.readouterr().out
    assert len(Store.open(store)) == 8
    folder.rename(tmp_path / "at 12:30")
    assert main(["index", "b c", "--images", "at 12:30", "--model", model, "--precision", "fp32"]) == 0
    assert "evaclip search 'b c' 'a red bicycle'" in capsys.readouterr().out
    assert str(tmp_path / "at 12:30" / "0.png") in Store.open(tmp_path / "b c").contents()


def test_index_command_repairs_text_tower(model, folder, tmp_path, capsys, caplog):
    """As after a first command that was killed before it wrote the tower."""
    store = tmp_path / "a.store"
    command = ["index", str(store), "--images", str(folder), "--model", model, "--precision", "fp32"]
    assert main(command) == 0
    for file in store.glob("text.*"):
        file.unlink()
    assert main(["search", str(store), "a cat"]) == 0
    assert "`evaclip index` adds the text tower" in caplog.text
    capsys.readouterr()
    assert main(command) == 0
    assert "added the missing text tower" in capsys.readouterr().out
    caplog.clear()
    assert main(["search", str(store), "a cat"]) == 0
    assert not caplog.text


def test_index_command_keeps_aspect_ratios(model, folder, tmp_path, capsys):
    index = ["index", str(tmp_path / "a.store"), "--images", str(folder), "--model", model, "--precision", "fp32"]
    assert main([*index, "--max-patches", "12"]) == 0
    store = Store.open(tmp_path / "a.store")
    assert store.model["max_patches"] == encoder_of(store).max_patches == 12
    capsys.readouterr()
    assert main(index) == 0
    assert "0 embedded, 7 unchanged" in capsys.readouterr().out
    assert main([*index, "--max-patches", "9"]) == 2
    assert "max_patches" in capsys.readouterr().err


def test_prune_removes_rows_of_deleted_images(model, folder, pictures, tmp_path, capsys):
    """Those of this folder alone: not of another, nor of a shard in it that is there."""
    store, other = tmp_path / "a.store", tmp_path / "pictures more"
    other.mkdir()
    (folder / "disk").mkdir()
    for place in (folder / "disk" / "x.png", folder / "disk" / "y.png", other / "z.png"):
        pictures[0].save(place)
    shard = folder / "disk" / "s.tar"
    with tarfile.open(shard, "w") as tar:
        tar.add(folder / "0.png", "0.png")
    index = ["index", str(store), "--precision", "fp32", "--model", model, "--images"]
    for source in (folder, other, shard):
        assert main([*index, str(source)]) == 0
    rows = set(Store.open(store).contents())
    assert len(rows) == 11
    for place in (folder / "3.png", folder / "disk" / "x.png", other / "z.png"):
        place.unlink()
    pictures[1].save(other / "new.png")
    capsys.readouterr()
    assert main([*index, str(folder)]) == 0
    assert f"2 rows of images deleted from {folder}: --prune removes them" in capsys.readouterr().out
    assert set(Store.open(store).contents()) == rows
    for name in ("s.tar", "y.png"):
        (folder / "disk" / name).rename(tmp_path / name)
    assert main([*index, str(folder), "--prune"]) == 2  # as if a disk were not mounted
    assert f"{folder / 'disk'} is empty, and the store has rows of images in it" in capsys.readouterr().err
    assert set(Store.open(store).contents()) == rows
    for name in ("s.tar", "y.png"):
        (tmp_path / name).rename(folder / "disk" / name)
    assert main([*index, str(folder), "--prune"]) == 0
    assert "removed 2 rows of deleted images" in capsys.readouterr().out
    assert set(Store.open(store).contents()) == rows - {str(folder / "3.png"), str(folder / "disk" / "x.png")}
    assert main([*index, str(shard), "--prune"]) == 2
    assert f"images deleted from a folder, which {shard} is not" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["--part", "environment"])
def test_index_parts_are_joined(by, model, folder, tmp_path, capsys, monkeypatch):
    store = tmp_path / "a.store"
    command = ["index", str(store), "--images", str(folder), "--model", model, "--thumbnails", "16"]
    for number in range(2):
        if by == "environment":
            for name, value in (("RANK", number), ("LOCAL_RANK", number), ("WORLD_SIZE", 2)):
                monkeypatch.setenv(name, str(value))
        assert main([*command, *(["--part", f"{number}/2"] if by == "--part" else [])]) == 0
        assert f"evaclip index {store} --add {store}-*" in capsys.readouterr().out
    monkeypatch.undo()
    parts = sorted(tmp_path.glob("a.store-*"))
    assert [(part.name, len(Store.open(part))) for part in parts] == [("a.store-0", 4), ("a.store-1", 3)]
    assert not store.exists()
    assert main(["index", str(store), "--add", *map(str, parts)]) == 0
    assert f"{parts[1]}: 3 rows added, 0 there before" in capsys.readouterr().out
    assert (store / "text.json").exists() == (parts[0] / "text.json").exists()
    assert main(["index", str(store), "--images", str(folder)]) == 0
    assert "0 embedded, 7 unchanged" in capsys.readouterr().out


def test_index_npz_of_images_and_texts(model, loaded, folder, pictures, tmp_path):
    encoder = Encoder(loaded, device="cpu", precision="fp32")
    compute = ["--model", model, "--precision", "fp32"]
    assert main(["index", "--npz", str(tmp_path / "a.npz"), "--images", str(folder), *compute]) == 0
    with np.load(tmp_path / "a.npz") as found:
        assert found["ids"].tolist() == [str(folder / f"{number}.png") for number in range(7)]
        np.testing.assert_allclose(found["embeddings"], encoder.images(pictures), atol=1e-5)
    (tmp_path / "texts.txt").write_bytes("\ufeffa cat\r\na\u2028dög\n".encode())
    assert main(["index", "--npz", str(tmp_path / "t.npz"), "--texts", str(tmp_path / "texts.txt"), *compute]) == 0
    with np.load(tmp_path / "t.npz") as found:
        assert found["ids"].tolist() == ["a cat", "a\u2028dög"]
        np.testing.assert_allclose(found["embeddings"], encoder.texts(["a cat", "a\u2028dög"]), atol=1e-5)


def test_store_refuses_changed_weights(folder, loaded, tmp_path, capsys):
    store, state = str(tmp_path / "a.store"), loaded.model.state_dict()
    weights, moved = tmp_path / "tiny.safetensors", tmp_path / "moved.safetensors"
    save_file(state, weights)
    index = ["index", store, "--images", str(folder), "--precision", "bf16", "--model"]
    search = ["search", store, "--image", str(folder / "3.png"), "--top", "1"]
    assert main([*index, f"tiny:{weights}"]) == 0
    assert main(search) == 0
    assert "3.png" in capsys.readouterr().out.replace("\n", "")
    save_file(state, moved)
    assert main([*index, f"tiny:{moved}"]) == 0  # equal weights may lie elsewhere
    assert "0 embedded, 7 unchanged" in capsys.readouterr().out
    save_file({name: tensor + 1 for name, tensor in state.items()}, weights)
    for command in (search, [*index, f"tiny:{weights}"]):
        assert main(command) == 2
        assert "another model (weights is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["index", "a.store", "--images", "pictures"], "there is no store 'a.store' yet: --model must"),
        (["index", "a.store", "--images", "pictures", "--model", "tiny"], "'tiny' has random weights"),
        (["index", "a.store", "--images", "nowhere", "--model", "MODEL"], "nowhere"),
        (["index", "a.store", "--add", "pictures"], "pictures isn't a store"),
        (["index", "a.store", "--add", "pictures", "--prune"], "--prune is for --images"),
        (["index", "a.store", "--texts", "x.txt"], "--texts is for --npz"),
        (["index", "pictures", "--images", "pictures", "--model", "MODEL"], "it isn't an empty folder"),
        (["index", "--npz", "a.npy", "--images", "pictures", "--model", "MODEL"], "--npz must be"),
        (["index", "--npz", "a.npz", "--images", "pictures"], "--npz needs --model"),
        (["index", "--npz", "a.npz", "--texts", "nowhere.txt", "--model", "MODEL"], "nowhere.txt can't be read"),
        (["index", "--npz", "pictures/0.npz", "--images", "pictures", "--model", "MODEL"], "exists; --force"),
    ],
)
def test_index_mistakes_are_one_line(arguments, says, model, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "0.npz").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main([model if word == "MODEL" else word for word in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert sorted(tmp_path.rglob("*")) == before
