"""`make hub`: a repository that Hugging Face's kernels loads."""

import base64
import hashlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils import is_kernels_available

from evakernels import _native
from evakernels.nn.layers import SwiGLUMLP

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "evakernels"
    (folder / "build/of-a-former-run").mkdir(parents=True)
    (folder / "build.toml").touch()
    subprocess.run([sys.executable, ROOT / "tools/hub.py", "--out", folder], check=True, capture_output=True)
    return folder


def test_hub_variants_have_digests_and_names(repository: Path) -> None:
    variants = {folder.name: folder for folder in (repository / "build").iterdir()}
    assert "torch-universal" in variants
    assert len(variants) == 1 + _native.LOADED + bool(_native.build_record().get("cuda"))
    general = tomllib.loads((repository / "build.toml").read_text())["general"]
    assert (general["name"], general["edition"]) == ("evakernels", 5)
    assert (repository / "torch-ext/evakernels/nn/layers.py").exists()
    ids = set()
    for variant, folder in variants.items():
        native = re.fullmatch(r"torch-stable-abi211-(cpu|cu)\d*-\w+-linux", variant)
        assert native or variant == "torch-universal"
        metadata = json.loads((folder / "metadata.json").read_text())
        assert (metadata["name"], metadata["version"]) == ("evakernels", general["version"])
        assert metadata["backend"]["type"] == ("cpu" if native and native[1] == "cpu" else "cuda")
        ids.add(metadata["id"])
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        del files["metadata.json"]
        digests = {name: base64.b64encode(hashlib.sha256(content).digest()) for name, content in files.items()}
        assert {name: digest.decode() for name, digest in digests.items()} == metadata["digest"]["files"]
        assert ("_ops.so" in files) == ("_build.json" in files) == bool(native)
        if native:
            assert b"evakernels_native" not in files["_ops.so"]
            assert f"{metadata['id']}_native".encode() in files["_ops.so"]
    assert len(ids) == len(variants)


def test_hub_refuses_another_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    done = subprocess.run([sys.executable, ROOT / "tools/hub.py", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "--out" in done.stderr
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.slow
@pytest.mark.skipif(not _native.LOADED, reason="the compiled library isn't built")
@pytest.mark.skipif(not is_kernels_available(), reason="this transformers takes another release of kernels")
def test_hub_models_match_their_originals(repository: Path) -> None:
    """In a process that has imported evakernels, too."""
    call = [sys.executable, Path(__file__).with_name("hub_models.py"), repository]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_swiglu_layer_keeps_other_activations() -> None:
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=8, hidden_act="gelu"))
    x = torch.randn(3, 32)
    torch.testing.assert_close(SwiGLUMLP.forward(mlp, x), mlp(x))
