"""`evaclip convert`: into every layout and back, without a change."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaclip import create_model, load_state_dict
from evaclip.commands.main import main
from evaclip.errors import UserError
from evaclip.train.overrides import dump_yaml
from evaclip.train.recipes import get_recipe
from evaclip.weights.convert import convert
from evaclip.weights.files import read_tensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save({"model": create_model("tiny", precision="bf16").state_dict()}, tmp_path / "source.pt")
    return tmp_path / "source.pt"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with one checkpoint, as the trainer writes it."""
    run = tmp_path / "runs/first"
    checkpoint = run / "checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_yaml(get_recipe("tiny")))
    (run / "log.jsonl").write_text('{"step": 1, "samples": 32, "loss": 0.5}\n')
    (checkpoint.parent / "latest").write_text("step_00000001\n")
    (checkpoint / "model.json").write_text('{"name": "tiny", "vision": {"image_size": 64}}')
    state = create_model("tiny", vision={"image_size": 64}).state_dict()
    save_file(state, checkpoint / "model.safetensors")
    return run


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(
    ("layout", "target"), [("original", "out.pt"), ("open_clip", "out.safetensors"), ("safetensors", "out.safetensors")]
)
def test_convert_round_trip(source: Path, layout: str, target: str) -> None:
    there, back = source.with_name(target), source.with_name("back.safetensors")
    assert main(["convert", str(source), str(there), "--to", layout]) == 0
    convert(there, back, "safetensors")
    assert_equal(load_file(back), load_state_dict(source))


def test_convert_timm_round_trip(source: Path) -> None:
    there, back = source.with_name("timm.safetensors"), source.with_name("back.pt")
    convert(source, there, "timm")
    convert(there, back, "original")
    whole = load_state_dict(source)
    assert "blocks.0.mlp.fc1_g.weight" in load_file(there)
    tower = {name.removeprefix("visual."): t for name, t in whole.items() if name.startswith("visual.")}
    assert_equal(read_tensors(back), tower)
    with pytest.raises(UserError, match="an image tower alone"):
        convert(back, source.with_name("no.pt"), "open_clip")
    assert not source.with_name("no.pt").exists()


@pytest.mark.parametrize(
    ("vision", "layouts"),
    [
        ({"pool": "attention", "mlp": "gelu", "sub_norm": False}, {"original", "open_clip", "timm"}),
        ({"prefix_tokens": 2}, {"original", "open_clip", "timm"}),
        ({"pool": "mean", "prefix_tokens": 0}, {"original", "open_clip", "timm"}),
        ({"pool": "mean", "layer_scale_init": 1e-5}, {"timm"}),
    ],
)
def test_convert_refuses_other_towers(vision: dict[str, Any], layouts: set[str], tmp_path: Path) -> None:
    """No other library has such a tower under these names; the last is timm's NaFlexVit with one register."""
    state = create_model("tiny", vision=vision).state_dict()
    torch.save(state, tmp_path / "source.pt")
    for layout in layouts:
        with pytest.raises(UserError, match="layout"):
            convert(tmp_path / "source.pt", tmp_path / "out.pt", layout)
    convert(tmp_path / "source.pt", tmp_path / "out.safetensors", "safetensors")
    assert_equal(load_file(tmp_path / "out.safetensors"), state)


def test_convert_adds_rotary_tables(source: Path) -> None:
    """Tables for the tower and each block that agree with the definition; another program's model.json is ignored."""
    source.with_name("model.json").write_text('{"model": "EVA"}')
    convert(source, source.with_name("out.pt"), "original")
    state, original = load_state_dict(source), torch.load(source.with_name("out.pt"))
    layers = sum(name.endswith("norm1.weight") for name in state)
    assert len(original) == len(state) + 2 * (1 + layers)
    cos = original[f"visual.blocks.{layers - 1}.attn.rope.freqs_cos"].float().unflatten(0, (4, 4))
    row, column, j = 1, 3, 2
    quarter = cos.shape[-1] // 4
    for axis, place in enumerate((row, column)):
        angle = torch.tensor(place / 4 * 16 * 10000 ** (-j / quarter))
        first = axis * cos.shape[-1] // 2 + 2 * j
        expected = angle.cos().expand(2)
        torch.testing.assert_close(cos[row, column, first : first + 2], expected, atol=4e-3, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out.pt", "--to", "safetensors"], "target"),
        (["out.onnx", "--to", "original"], "expected one of .safetensors, .pt"),
        (["out.pt", "--to", "original", "--model", "emoji"], "the weights aren't of 'emoji': "),
        (["no/such/folder/out.pt", "--to", "original"], "there is no folder"),
        (["out.pt", "--to", "original", "--interpolate", "source.pt", "2"], "ALPHA must be in [0, 1], got 2"),
    ],
)
def test_convert_wrong_arguments(source, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(source.parent)
    assert main(["convert", str(source), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in source.parent.iterdir()] == ["source.pt"]


def test_convert_run_by_its_configuration(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(run_folder), str(run_folder.parent / "out.pt"), "--to", "original", "--model"]
    assert main([*command, "EVA02-B-16"]) == 2
    assert "the weights are of 'tiny', not of 'EVA02-B-16'" in capsys.readouterr().err
    assert main([*command, "tiny"]) == 0
    assert len(torch.load(command[2])["visual.rope.freqs_cos"]) == 8 * 8


def test_convert_interpolates(source: Path) -> None:
    torch.manual_seed(1)
    other, out = source.with_name("other.safetensors"), source.with_name("out.safetensors")
    save_file(create_model("tiny").state_dict(), other)
    a, b = load_state_dict(source), load_state_dict(other)
    for options, shares in (
        (["--interpolate", str(other), "0.25"], (0.75, 0.25)),
        (["--average", str(other), str(other)], (1 / 3, 2 / 3)),
    ):
        assert main(["convert", str(source), str(out), "--to", "safetensors", "--force", *options]) == 0
        expected = {name: (shares[0] * a[name].double() + shares[1] * b[name].double()).bfloat16() for name in a}
        torch.testing.assert_close(load_file(out), expected, rtol=2**-7, atol=1e-6)
    save_file(create_model("tiny", vision={"image_size": 64}).state_dict(), other)
    with pytest.raises(UserError, match="of one model"):
        convert(source, source.with_name("out.pt"), "original", others=[(other, 0.5)])


@pytest.mark.parametrize("link", [None, "symlink_to"])
def test_convert_never_overwrites_source(source: Path, link: str | None) -> None:
    before, target = source.read_bytes(), source
    if link:
        target = source.with_name("alias.pt")
        getattr(target, link)(source)
    with pytest.raises(UserError, match="never overwritten"):
        convert(source, target, "original", overwrite=True)
    assert source.read_bytes() == before
    part, index = source.with_name("part-1.safetensors"), source.with_name("model.safetensors.index.json")
    convert(source, part, "safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(part), part.name)}))
    with pytest.raises(UserError, match="never overwritten"):
        convert(index, part, "safetensors", overwrite=True)


@pytest.mark.parametrize("name", ["checkpoints/step_00000001/model.safetensors", "new.pt"])
def test_convert_never_writes_into_run(run_folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    for source in (run_folder, run_folder / "checkpoints/step_00000001"):
        assert main(["convert", str(source), str(run_folder / name), "--to", "open_clip", "--force"]) == 2
        assert "never overwritten" in (error := capsys.readouterr().err) or "only the training writes" in error
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == files


def test_convert_and_export_write_card(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted, exported = (run_folder.with_name(name) for name in ("mine.pt", "text.pt2"))
    for command in (
        ["convert", str(run_folder), str(converted), "--to", "open_clip"],
        ["export", str(run_folder), str(exported), "--tower", "text"],
    ):
        assert main(command) == 0
        file = Path(command[2])
        card = file.with_name(f"{file.name}.md")
        assert f"# {file.stem}\n" in card.read_text()
        assert "- **Steps:** 1 of 32 pairs, 32 in all\n" in card.read_text()
        assert main(command) == 2
        assert f"{file.name}' exists; --force" in capsys.readouterr().err
        file.unlink()
        assert main(command) == 2
        assert f"{card.name}' exists; --force" in capsys.readouterr().err
        assert main([*command, "--force"]) == 0


def test_convert_to_full_disk_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)\nat 3")

    monkeypatch.setattr("evaclip.weights.files.save_file", fail)
    with pytest.raises(UserError, match=r"cannot write .*out\.safetensors: .*No space left on device"):
        convert(source, source.with_name("out.safetensors"), "original", "tiny")
    assert sorted(path.name for path in source.parent.iterdir()) == ["source.pt"]
