"""Exported towers against the model that they come from."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch

from evaclip import create_model
from evaclip.commands.main import main
from evaclip.errors import UserError
from evaclip.export import export
from evaclip.model.clip import CLIP


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    model = create_model("tiny", vision={"layers": 2}, text={"layers": 2}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def example(model: CLIP, tower: str, batch: int) -> torch.Tensor:
    if tower == "image":
        return torch.randn(batch, 3, *model.config.vision.image_shape)
    return torch.randint(1, 400, (batch, model.config.text.context_length))


def embeddings(model: CLIP, tower: str, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        encode = model.encode_image if tower == "image" else model.encode_text
        return encode(inputs, normalize=True)


@pytest.mark.parametrize("tower", ["image", pytest.param("text", marks=pytest.mark.exhaustive)])
def test_the_program_equals_the_model_for_any_batch(model: CLIP, tower: str, tmp_path: Path) -> None:
    export(model, tower, tmp_path / "tower.pt2", normalize=True)
    program = torch.export.load(tmp_path / "tower.pt2")
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "evakernels" in name or "softmax" in name]
    assert "aten.scaled_dot_product_attention.default" in operators
    for batch in (0, 1, 3):
        inputs = example(model, tower, batch)
        torch.testing.assert_close(program.module()(inputs), embeddings(model, tower, inputs), atol=1e-5, rtol=0)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "text.pt2"
    command = ["export", "tiny", str(target), "--tower", "text", "--random"]
    assert main(command) == 0
    assert f"wrote {target}, with random weights" in capsys.readouterr().out
    before = target.read_bytes()
    assert main(command) == 2
    assert "text.pt2' exists; --force" in capsys.readouterr().err
    assert target.read_bytes() == before
    assert main([*command, "--force"]) == 0
    assert main(["export", "tiny", str(tmp_path / "text.tflite"), "--tower", "text", "--random"]) == 2
    assert "expected .pt2 or .onnx" in capsys.readouterr().err
    for options, named in (
        (["--tower", "text"], "'tiny' has random weights"),
        (["--random"], "--tower must be"),
        (["--tower", "text", "--random", "--provider", "X"], "--provider is for --check FILE"),
    ):
        assert main(["export", "tiny", str(tmp_path / "other.onnx"), *options]) == 2
        assert named in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.pt2"]


def test_export_into_a_run_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.yaml").touch()
    monkeypatch.setattr("evaclip.loading.load_features", None)
    for target in (tmp_path / "run/image.onnx", tmp_path / "missing/image.onnx"):
        assert main(["export", "tiny", str(target), "--tower", "image", "--random", "--force"]) == 2


def test_missing_packages_are_named(model: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"the package onnxscript is not installed: pip install 'evakernels\[export\]'"):
        export(model, "text", tmp_path / "text.onnx")
    assert not list(tmp_path.iterdir())


def test_command_checks_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "text.onnx"
    assert main(["export", "tiny", str(target), "--tower", "text", "--random", "--dtype", "fp16"]) == 0
    assert re.search(r"CPUExecutionProvider: (1\.0|0\.9999)", capsys.readouterr().out)
    assert main(["export", "--check", str(target), "--provider", "CPUExecutionProvider"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    probe = onnx.load(target)
    embedding = next(each for each in probe.graph.initializer if 49408 in each.dims)
    embedding.raw_data = embedding.raw_data[::-1]
    onnx.save(probe, target)
    assert main(["export", "--check", str(target)]) == 1
    assert "expected a cosine of 0.9999 or more" in capsys.readouterr().err
    for ignored in (["tiny"], ["--random"], ["--dtype", "fp16"], ["--normalize"]):
        assert main(["export", *ignored, "--check", str(target)]) == 2
        assert "--check takes FILE and --provider" in capsys.readouterr().err
    assert main(["export", "--check", str(tmp_path / "missing.onnx")]) == 2


def test_check_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "other.onnx").touch()
    code = f"""
import sys
sys.modules["torch"] = sys.modules["onnx"] = None
from evaclip.commands.main import main
assert main(["export", "--check", {str(tmp_path / "other.onnx")!r}]) == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_export_to_a_full_disk(model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match=r"cannot write \S+image.pt2: it takes \d\.\d MB, and its disk has 0\.0 free"):
        export(model, "image", tmp_path / "image.pt2")
