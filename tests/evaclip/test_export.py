"""Exported programs, of torch.export and ONNX, against their model; wrong programs aren't written."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from lively_model import lively

from evaclip.commands.main import main
from evaclip.errors import Refused, UserError
from evaclip.export import export
from evaclip.model.clip import CLIP
from evaclip.model.vision_model import VisionModel
from evaclip.packing import pack_images
from evakernels.nn import FrozenWeight, freeze, unfreeze
from evakernels.nn.linear import faster_dtypes

OPTIONS = {
    "large": {"vision": {"layers": 2, "sub_norm": False, "post_norm": True, "mlp": "gelu", "rope": False}},
    "rms": {"vision": {"layers": 2, "sub_norm": False, "norm": "rms_norm", "qkv_bias": False, "pool": "mean"}},
    "scaled": {"vision": {"layers": 2, "sub_norm": False, "layer_scale_init": 0.1, "image_size": (32, 48)}},
}


@pytest.fixture(scope="module")
def model() -> CLIP:
    return lively(vision={"layers": 2}, text={"layers": 2})


def example(model: CLIP, tower: str, batch: int) -> torch.Tensor:
    if tower == "image":
        return torch.randn(batch, 3, *model.config.vision.image_shape)
    return torch.randint(1, 400, (batch, model.config.text.context_length))


def onnx_error(model: CLIP, tower: str, path: Path, batch: int = 2, normalize: bool = True) -> float:
    """Largest difference of ONNX Runtime's embeddings to the model's, relative to the longest embedding."""
    inputs = example(model, tower, batch)
    (found,) = onnxruntime.InferenceSession(path).run(None, {"inputs": inputs.numpy()})
    expected = encode(model, tower, inputs, normalize=normalize)
    return float((torch.from_numpy(found) - expected).abs().max() / expected.norm(dim=1).max())


def encode(model: CLIP, tower: str, inputs: torch.Tensor, normalize: bool = True) -> torch.Tensor:
    with torch.no_grad():
        return (model.encode_image if tower == "image" else model.encode_text)(inputs, normalize=normalize)


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
    export(model, tower, tmp_path / "tower.onnx", normalize=True)
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
    model = lively(**options)
    export(model, "image", tmp_path / "image.onnx", normalize=True)
    assert onnx_error(model, "image", tmp_path / "image.onnx") < 1e-4


@pytest.mark.parametrize(("tower", "dtype"), [("image", "fp16"), ("text", "bf16")])
def test_onnx_16_bits_halve_the_file(model: CLIP, dtype: str, tower: str, tmp_path: Path) -> None:
    export(model, tower, tmp_path / "half.onnx", dtype=dtype)
    weights = (model.visual if tower == "image" else model.text).state_dict().values()
    assert (tmp_path / "half.onnx").stat().st_size < 0.6 * sum(weight.nbytes for weight in weights)


def test_onnx_text_without_causal_mask(tmp_path: Path) -> None:
    model = lively(text={"layers": 1, "causal": False, "proj_bias": True, "mlp": "gelu_tanh"})
    export(model, "text", tmp_path / "text.onnx", normalize=True)
    assert onnx_error(model, "text", tmp_path / "text.onnx") < 1e-4


@pytest.mark.parametrize("changed", ["order", "confused", "length"])
def test_onnx_of_a_wrong_program_is_refused(changed, model, tmp_path, monkeypatch):
    """Patches in another order, as a wrong rotation would give; no patch embedding; a projection that is too large."""
    make = torch.onnx.export

    def wrong(program, **options):
        weights = {name.removeprefix("tower."): value.data for name, value in program.state_dict.items()}
        if changed == "order":
            weights["pos_embed"].copy_(weights["pos_embed"].flip(1))
        elif changed == "confused":
            weights["patch_embed.proj.weight"].zero_()
        else:
            weights["head.weight"].mul_(1.2)
            weights["head.bias"].mul_(1.2)
        return make(program, **options)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(Refused, match=r"cosine of 0\.9999"):
        export(model, "image", tmp_path / "image.onnx")
    assert not list(tmp_path.iterdir())


def test_onnx_external_weights(model: CLIP, tmp_path: Path) -> None:
    path, data = tmp_path / "text.onnx", tmp_path / "text.onnx.data"
    export(model, "text", path, external=True)
    assert sorted(tmp_path.iterdir()) == [path, data]
    assert path.stat().st_size < data.stat().st_size / 10
    assert path.stat().st_mode == data.stat().st_mode
    assert onnx_error(model, "text", path, normalize=False) < 1e-4
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
    assert is_frozen == (int8 or dtype in faster_dtypes())


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
    with pytest.raises(UserError, match="dtype"):
        export(model, "text", tmp_path / "text.pt2", dtype="fp16")
    model = copy.deepcopy(model)
    model.visual.set_image_size(48)
    with pytest.raises(UserError, match=r"set_image_size\(48\) is in force; call set_image_size\(32\)"):
        export(model, "image", tmp_path / f"image.{suffix}")
    assert not list(tmp_path.iterdir())


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
    assert "must end in .pt2 or .onnx" in capsys.readouterr().err
    for options, named in ((["--tower", "text"], "'tiny' has random weights"), (["--random"], "--tower must be")):
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


def test_export_to_a_full_disk(model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match=r"cannot write \S+image.pt2: it takes \d\.\d MB, and its disk has 0\.0 free"):
        export(model, "image", tmp_path / "image.pt2")
