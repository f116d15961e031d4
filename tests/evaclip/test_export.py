"""Exported programs, of torch.export and ONNX, against their model; wrong programs aren't written."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from lively_model import lively

from evaclip.commands.main import main
from evaclip.errors import Refused, UserError
from evaclip.export import export
from evaclip.model.clip import CLIP
from evaclip.model.vision_model import VisionModel
from evaclip.onnx_check import KEY, check
from evaclip.packing import pack_images
from evakernels.nn import FrozenWeight, freeze, unfreeze
from evakernels.nn.linear import served_dtypes

OPTIONS = {
    "large": {"vision": {"layers": 2, "sub_norm": False, "post_norm": True, "mlp": "gelu", "rope": False}},
    "rms": {"vision": {"layers": 2, "sub_norm": False, "norm": "rms_norm", "qkv_bias": False, "pool": "mean"}},
    "scaled": {"vision": {"layers": 2, "sub_norm": False, "layer_scale_init": 0.1, "image_size": (32, 48)}},
}


@pytest.fixture(scope="module")
def model() -> CLIP:
    return lively(vision={"layers": 2}, text={"layers": 2})


@pytest.fixture(scope="module")
def image_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "image.onnx"
    export(model, "image", path)
    return path


def example(model: CLIP, tower: str, batch: int) -> torch.Tensor:
    if tower == "image":
        return torch.randn(batch, 3, *model.config.vision.image_shape)
    return torch.randint(1, 400, (batch, model.config.text.context_length))


def encode(model: CLIP, tower: str, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return (model.encode_image if tower == "image" else model.encode_text)(inputs, normalize=True)


@pytest.mark.parametrize("tower", ["image", pytest.param("text", marks=pytest.mark.exhaustive)])
def test_pt2_equals_model_for_any_batch(model: CLIP, tower: str, tmp_path: Path) -> None:
    export(model, tower, tmp_path / "tower.pt2", normalize=True)
    program = torch.export.load(tmp_path / "tower.pt2")
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "evakernels" in name or "softmax" in name]
    assert "aten.scaled_dot_product_attention.default" in operators
    for batch in (0, 1, 3):
        inputs = example(model, tower, batch)
        torch.testing.assert_close(program.module()(inputs), encode(model, tower, inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_onnx_equals_model_for_any_batch(model: CLIP, tower: str, tmp_path: Path) -> None:
    outcomes = export(model, tower, tmp_path / "tower.onnx", normalize=True)
    assert [outcome.provider for outcome in outcomes] == ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(tmp_path / "tower.onnx")
    for batch in (0, 1, 3) if tower == "image" else (1, 3):
        inputs = example(model, tower, batch)
        (found,) = session.run(None, {"inputs": inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), encode(model, tower, inputs), atol=1e-4, rtol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["tower.onnx"]
    assert str(Path(__file__).parents[2]).encode() not in (tmp_path / "tower.onnx").read_bytes()


def test_classifier_equals_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = lively(vision={"layers": 2}).visual
    classifier = VisionModel(tower.config, num_classes=5).eval()
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    images = torch.randn(3, 3, *tower.config.image_shape)
    with torch.no_grad():
        expected = classifier(images)
    for suffix in ("onnx", "pt2"):
        export(classifier, "image", tmp_path / f"classifier.{suffix}")
    session = onnxruntime.InferenceSession(tmp_path / "classifier.onnx")
    (found,) = session.run(None, {"inputs": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.export.load(tmp_path / "classifier.pt2").module()(images), expected)
    with pytest.raises(UserError, match="tower"):
        export(classifier, "text", tmp_path / "text.onnx")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_onnx_of_every_kind_of_block(options: dict[str, dict[str, object]], tmp_path: Path) -> None:
    assert all(each.cosine > 0.99999 for each in export(lively(**options), "image", tmp_path / "image.onnx"))


@pytest.mark.parametrize(("tower", "dtype"), [("image", "fp16"), ("text", "bf16")])
def test_onnx_16_bits_halve_the_file(model: CLIP, dtype: str, tower: str, tmp_path: Path) -> None:
    export(model, tower, tmp_path / "half.onnx", dtype=dtype)
    weights = (model.visual if tower == "image" else model.text).state_dict().values()
    assert (tmp_path / "half.onnx").stat().st_size < 0.6 * sum(weight.nbytes for weight in weights)


def test_onnx_text_without_causal_mask(tmp_path: Path) -> None:
    """The program computes all positions; it was compared with the model when it was written."""
    model = lively(text={"layers": 1, "causal": False, "proj_bias": True, "mlp": "gelu_tanh"})
    assert all(each.cosine > 0.99999 for each in export(model, "text", tmp_path / "text.onnx"))


def test_onnx_int8(model: CLIP, tmp_path: Path) -> None:
    path = tmp_path / "image.onnx"
    outcomes = export(model, "image", path, int8=True, external=True)
    assert all(outcome.passes and outcome.lowest == 0.99 for outcome in outcomes)
    assert "MatMulInteger" in {node.op_type for node in onnx.load(path).graph.node}
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "image.onnx.data"]


def test_onnx_of_a_wrong_program_is_refused(model, tmp_path, monkeypatch):
    """The image tower's patches in another order, as a wrong rotation would turn them."""
    make = torch.onnx.export

    def wrong(program, **options):
        for name, value in program.state_dict.items():
            if name.endswith("pos_embed"):
                value.data.copy_(value.flip(1))
        return make(program, **options)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(Refused, match=r"expected a cosine of 0\.9999 or more: CPUExecutionProvider: 0\."):
        export(model, "image", tmp_path / "image.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changed", ["largest weight", "patch embedding", "scale"])
def test_onnx_check_finds_changed_weights(changed, image_file, tmp_path):
    """Without a patch embedding, all inputs give one vector; the cosine sees no scale."""
    program = onnx.load(image_file)
    weights = program.graph.initializer
    if changed == "scale":
        last = program.graph.node[-1]
        inside = f"{last.output[0]}_inside"
        program.graph.node.append(onnx.helper.make_node("Add", [inside, inside], [last.output[0]]))
        last.output[0] = inside
    else:
        largest = max(weights, key=lambda tensor: len(tensor.raw_data))
        patches = next(tensor for tensor in weights if tuple(tensor.dims)[2:] == (8, 8))
        weight = largest if changed == "largest weight" else patches
        weight.raw_data = bytes(len(weight.raw_data))
    onnx.save(program, tmp_path / "image.onnx")
    outcomes = check(tmp_path / "image.onnx")
    assert not any(outcome.passes for outcome in outcomes)
    words = {"patch embedding": "confused", "scale": "another length"}.get(changed, "")
    assert words in outcomes[0].problem


def test_onnx_external_weights(model: CLIP, tmp_path: Path) -> None:
    path, data = tmp_path / "text.onnx", tmp_path / "text.onnx.data"
    export(model, "text", path, external=True)
    assert sorted(tmp_path.iterdir()) == [path, data]
    assert path.stat().st_size < data.stat().st_size / 10
    assert path.stat().st_mode == data.stat().st_mode
    assert all(outcome.passes for outcome in check(path))
    export(model, "text", path, overwrite=True)
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("int8", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_frozen_weights_are_exported_dense(model: CLIP, int8: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    frozen = freeze(copy.deepcopy(model).to(dtype), int8=int8)
    export(frozen, "image", tmp_path / "image.onnx")
    export(frozen, "image", tmp_path / "image.pt2")
    images = torch.randn(2, 3, *model.config.vision.image_shape)
    with torch.no_grad():
        expected = unfreeze(copy.deepcopy(frozen)).encode_image(images.to(dtype))
        found = torch.export.load(tmp_path / "image.pt2").module()(images.to(dtype))
    assert torch.cosine_similarity(found.float(), expected.float()).min() > 0.999
    # float32 is frozen only where oneDNN's matmuls are faster than torch's.
    is_frozen = any(isinstance(weight, FrozenWeight) for weight in frozen.parameters())
    assert is_frozen == (int8 or dtype in served_dtypes())


def test_pt2_of_packed_images_equals_model(model: CLIP, tmp_path: Path) -> None:
    export(model, "image", tmp_path / "image.pt2", normalize=True, max_patches=24)
    program = torch.export.load(tmp_path / "image.pt2").module()
    for sizes in (((32, 32),), ((64, 24), (8, 40), (16, 48))):
        images = pack_images([torch.randn(3, *size) for size in sizes], 8)
        with torch.no_grad():
            expected = model.encode_image(images, normalize=True)
            found = program(images.patches, images.positions, images.sizes, images.lengths)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for tower, file, limit in (("text", "a.pt2", 24), ("image", "a.onnx", 24), ("image", "a.pt2", 0)):
        with pytest.raises(UserError, match="max_patches"):
            export(model, tower, tmp_path / file, max_patches=limit)


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_export_refuses_other_tower_and_size(model: CLIP, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown tower 'img'; did you mean 'image'"):
        export(model, "img", tmp_path / f"image.{suffix}")  # type: ignore[arg-type]
    model = copy.deepcopy(model)
    model.visual.set_image_size(48)
    with pytest.raises(UserError, match=r"set_image_size\(48\) is in force; call set_image_size\(32\)"):
        export(model, "image", tmp_path / f"image.{suffix}")
    assert not list(tmp_path.iterdir())


def test_check_refuses_files_without_probe(image_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "image.onnx"
    bare = onnx.load(image_file)
    kept = [entry for entry in bare.metadata_props if entry.key != KEY]
    del bare.metadata_props[:]
    onnx.save(bare, path)
    with pytest.raises(UserError, match="holds no probe; expected a file that `evaclip export` wrote"):
        check(path)
    bare.metadata_props.extend([*kept, onnx.StringStringEntryProto(key=KEY, value="{}")])
    onnx.save(bare, path)
    with pytest.raises(UserError, match=r"can't be read.*export the file again"):
        check(path)
    path.write_bytes(b"no model")
    with pytest.raises(UserError, match="can't be read as ONNX"):
        check(path)


def test_export_refuses_provider_and_dtype(model: CLIP, image_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"provider must be .*CPUExecutionProvider, got 'TPU'"):
        check(image_file, providers=["TPU"])
    with pytest.raises(UserError, match="don't go together"):
        export(model, "text", tmp_path / "other.onnx", dtype="fp16", int8=True)
    with pytest.raises(UserError, match=r"those of ONNX files"):
        export(model, "text", tmp_path / "text.pt2", int8=True)


def test_export_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "text.pt2"
    command = ["export", "tiny", str(target), "--tower", "text", "--random"]
    assert main(command) == 0
    assert f"wrote {target}, with random weights" in capsys.readouterr().out
    before = target.read_bytes()
    assert main(command) == 2
    assert "text.pt2' exists; --force" in capsys.readouterr().err
    assert target.read_bytes() == before
    assert main([*command, "--force"]) == 0
    assert main(["export", "tiny", "--tower", "text", str(target), "--random", "--force"]) == 0
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


def test_missing_package_names_its_extra(model: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"the package onnxscript is not installed: pip install 'evakernels\[export\]'"):
        export(model, "text", tmp_path / "text.onnx")
    assert not list(tmp_path.iterdir())


def test_check_command_finds_changed_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
