"""`evaclip convert`: into every layout and back, without a change."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaclip import create_model, create_vision_model, load_state_dict
from evaclip.commands.main import main
from evaclip.errors import UserError
from evaclip.train.overrides import dump_yaml
from evaclip.train.recipes import get_recipe
from evaclip.weights.convert import convert, identify
from evaclip.weights.files import read_tensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save({"model": create_model("tiny", precision="bf16").state_dict()}, tmp_path / "source.pt")
    return tmp_path / "source.pt"


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("layout", "target"), [("original", "out.pt"), ("open_clip", "out.safetensors"), ("safetensors", "out.safetensors")]
)
def test_round_trip(source: Path, layout: str, target: str) -> None:
    there, back = source.with_name(target), source.with_name("back.safetensors")
    assert main(["convert", str(source), str(there), "--to", layout]) == 0
    convert(there, back, "safetensors")
    assert_equal(load_file(back), load_state_dict(source))


def test_image_tower_alone_to_timm_and_back(source: Path) -> None:
    there, back = source.with_name("timm.safetensors"), source.with_name("back.pt")
    convert(source, there, "timm")
    convert(there, back, "original")
    whole = load_state_dict(source)
    assert "blocks.0.mlp.fc1_g.weight" in load_file(there)
    assert_equal(
        read_tensors(back), {n.removeprefix("visual."): t for n, t in whole.items() if n.startswith("visual.")}
    )
    with pytest.raises(UserError, match="an image tower alone"):
        convert(back, source.with_name("no.pt"), "open_clip")
    assert not source.with_name("no.pt").exists()


def test_weights_of_eva_large_leave_with_timms_joint_bias(tmp_path: Path) -> None:
    model = create_vision_model("eva_large_patch14_196", layers=1)
    torch.save(model.state_dict(), tmp_path / "large.pt")
    convert(tmp_path / "large.pt", tmp_path / "timm.pt", "timm")
    peer = timm.create_model("eva_large_patch14_196", depth=1)
    peer.load_state_dict(torch.load(tmp_path / "timm.pt"))


@pytest.mark.parametrize("layout", ["original", "open_clip", "timm", "safetensors"])
def test_other_models_weights_are_refused(layout: str, tmp_path: Path) -> None:
    torch.save({"visual.transformer.resblocks.0.ln_1.bias": torch.zeros(1)}, tmp_path / "vit.pt")
    with pytest.raises(UserError, match="holds no image tower of the EVA series"):
        convert(tmp_path / "vit.pt", tmp_path / "out.safetensors", layout)
    assert not (tmp_path / "out.safetensors").exists()


def test_tied_weights_are_written_twice(source: Path) -> None:
    state = load_state_dict(source)
    state["visual.blocks.1.norm1.weight"] = state["visual.blocks.0.norm1.weight"]
    torch.save(state, source.with_name("tied.pt"))
    convert(source.with_name("tied.pt"), source.with_name("tied.safetensors"), "safetensors")
    assert_equal(load_file(source.with_name("tied.safetensors")), state)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": "EVA"}'])
def test_another_programs_model_json_says_nothing(content: str, source: Path) -> None:
    source.with_name("model.json").write_text(content)
    convert(source, source.with_name("out.pt"), "original")


def test_original_file_has_the_authors_rotary_tables() -> None:
    """436 names for B/16, and tables that agree with the definition."""
    from evaclip.weights.convert import _with_rotary_tables

    state = create_model("EVA02-CLIP-B-16", device="meta").state_dict()
    assert identify(state) == "EVA02-CLIP-B-16"
    original = _with_rotary_tables(state, None, Path("b16.pt"))
    assert len(original) == 436
    cos = original["visual.blocks.11.attn.rope.freqs_cos"]
    assert cos.shape == (196, 64)
    row, column, j = 5, 9, 3
    angle = torch.tensor([row, column]) / 14 * 16 * 10000 ** (-j / 16)
    patch = cos[row * 14 + column]
    torch.testing.assert_close(patch[[2 * j, 2 * j + 1]], angle[0].cos().expand(2))
    torch.testing.assert_close(patch[[32 + 2 * j, 33 + 2 * j]], angle[1].cos().expand(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out.pt", "--to", "safetensors"], "doesn't end in .safetensors"),
        (["out.onnx", "--to", "original"], "expected one of .safetensors, .pt"),
        (["out.pt", "--to", "original", "--model", "nothing"], "unknown model 'nothing'"),
        (["out.pt", "--to", "original", "--model", "emoji"], "the weights aren't of 'emoji': "),
        (["out.pt", "--to", "timm", "--model", "eva_larg_patch14_196"], "unknown model 'eva_larg_patch14_196'"),
    ],
)
def test_mistakes_are_one_line(source, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(source.parent)
    assert main(["convert", str(source), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in source.parent.iterdir()) == ["source.pt"]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with one checkpoint, as the trainer leaves it."""
    checkpoint = tmp_path / "runs/first/checkpoints/step_00000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "runs/first/config.yaml").write_text("name: first\n")
    (checkpoint.parent / "latest").write_text("step_00000001\n")
    (checkpoint / "model.json").write_text('{"name": "tiny"}')
    save_file(create_model("tiny").state_dict(), checkpoint / "model.safetensors")
    return tmp_path / "runs/first"


def test_a_runs_rotary_tables_are_of_its_own_size(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, target = run_folder / "checkpoints/step_00000001", run_folder.parent / "out.pt"
    (checkpoint / "model.json").write_text('{"name": "tiny", "vision": {"image_size": 64}}')
    state = create_model("tiny", vision={"image_size": 64}).state_dict()
    save_file(state, checkpoint / "model.safetensors")
    assert main(["convert", str(run_folder), str(target), "--to", "original", "--model", "EVA02-B-16"]) == 2
    assert "the weights are of 'tiny', not of 'EVA02-B-16'" in capsys.readouterr().err
    assert main(["convert", str(run_folder), str(target), "--to", "original", "--model", "tiny"]) == 0
    assert len(torch.load(target)["visual.rope.freqs_cos"]) == 8 * 8 == len(state["visual.pos_embed"][0]) - 1


def test_an_existing_file_is_replaced_only_when_asked(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.with_name("there.safetensors")
    target.write_bytes(b"mine")
    command = ["convert", str(source), str(target), "--to", "safetensors"]
    assert main(command) == 2
    assert "there.safetensors' exists; --force" in capsys.readouterr().err
    assert target.read_bytes() == b"mine"
    assert main([*command, "--force"]) == 0
    assert_equal(load_file(target), load_state_dict(source))


@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
def test_a_file_never_becomes_its_own_source(source: Path, link: str | None) -> None:
    before, target = source.read_bytes(), source
    if link:
        target = source.with_name("alias.pt")
        getattr(target, link)(source)
    with pytest.raises(UserError, match="is what is read, and is never written over"):
        convert(source, target, "original", overwrite=True)
    assert source.read_bytes() == before


def test_no_part_of_the_weights_is_written_over(source: Path) -> None:
    part, index = source.with_name("part-1.safetensors"), source.with_name("model.safetensors.index.json")
    convert(source, part, "safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(part), part.name)}))
    before = part.read_bytes()
    with pytest.raises(UserError, match="is what is read"):
        convert(index, part, "safetensors", overwrite=True)
    assert part.read_bytes() == before


@pytest.mark.parametrize("name", ["checkpoints/step_00000001/model.safetensors", "checkpoints/new.pt", "new.pt"])
def test_nothing_is_written_into_a_run(run_folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    for given in (run_folder, run_folder / "checkpoints/step_00000001"):
        command = ["convert", str(given), str(run_folder / name), "--to", "open_clip", "--force"]
        assert main(command) == 2
        assert "never written over" in (error := capsys.readouterr().err) or "only the training writes" in error
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == files
    assert main(["convert", str(run_folder), str(run_folder.with_name("out.pt")), "--to", "open_clip"]) == 0


def test_a_file_of_a_run_has_a_card_beside_it(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "config.yaml").write_text(dump_yaml(get_recipe("tiny")))
    (run_folder / "log.jsonl").write_text('{"step": 1, "samples": 32, "loss": 0.5}\n')
    converted, exported = (run_folder.with_name(name) for name in ("mine.pt", "text.pt2"))
    for command in (
        ["convert", str(run_folder), str(converted), "--to", "open_clip"],
        ["export", str(run_folder), str(exported), "--tower", "text"],
    ):
        assert main(command) == 0
        assert main([*command, "--force"]) == 0
        Path(command[2]).unlink()
        assert main(command) == 2
        assert f"{Path(command[2]).name}.md' exists; --force" in capsys.readouterr().err
    for file in (converted, exported):
        text = file.with_name(f"{file.name}.md").read_text()
        assert f"# {file.stem}\n" in text
        assert "- **Steps:** 1 of 32 pairs, 32 in all\n" in text


@pytest.mark.parametrize(
    ("target", "message"),
    [("no/such/folder/out.pt", "there is no folder"), ("folder.pt", "is a folder; give the file to write")],
)
def test_an_unwritable_target_is_one_line(source, target, message, capsys):
    source.with_name("folder.pt").mkdir()
    assert main(["convert", str(source), str(source.parent / target), "--to", "original"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_full_disk_is_one_line_and_leaves_nothing(source: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)\nat 3")

    monkeypatch.setattr("evaclip.weights.files.save_file", fail)
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=rf"cannot write .*out{suffix}: .*No space left on device \(os error 28\)$"):
        convert(source, source.with_name(f"out{suffix}"), "original", "tiny")
    assert sorted(path.name for path in source.parent.iterdir()) == ["source.pt"]
