"""`evaclip convert`: into every layout and back, without a change."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from evaclip import create_model, load_state_dict
from evaclip.commands.main import main
from evaclip.errors import UserError
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
    ("layout", "target"),
    [
        ("original", "out.pt"),
        ("original", "out.safetensors"),
        ("open_clip", "out.safetensors"),
        ("safetensors", "out.safetensors"),
    ],
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


def test_original_file_has_the_authors_rotary_tables() -> None:
    """436 names for B/16, and tables that agree with the definition."""
    from evaclip.weights.convert import _with_rotary_tables

    state = create_model("EVA02-CLIP-B-16", device="meta").state_dict()
    assert identify(state) == "EVA02-CLIP-B-16"
    original = _with_rotary_tables(state, None)
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
    ],
)
def test_mistakes_are_one_line(
    source: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(source.parent)
    assert main(["convert", str(source), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in source.parent.iterdir()) == ["source.pt"]
