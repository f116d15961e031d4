"""`make hub`: a repository that Hugging Face's kernels loads."""

import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from evakernels import _native

ROOT = Path(__file__).parents[2]
LAYERS = Path(__file__).with_name("hub_layers.py")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "evakernels"
    subprocess.run([sys.executable, ROOT / "tools/hub.py", "--out", folder], check=True, capture_output=True)
    return folder


def test_hub_variants_have_digests_and_names(repository: Path) -> None:
    variants = sorted((repository / "build").iterdir())
    assert any(folder.name == "torch-universal" for folder in variants)
    assert len(variants) == 1 + _native.LOADED + bool(_native.build_record().get("cuda"))
    names = set()
    for folder in variants:
        metadata = json.loads((folder / "metadata.json").read_text())
        names.add(metadata["id"])
        files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
        del files["metadata.json"]
        digests = {name: base64.b64encode(hashlib.sha256(file.read_bytes()).digest()) for name, file in files.items()}
        assert {name: digest.decode() for name, digest in digests.items()} == metadata["digest"]["files"]
        if (library := folder / "_ops.so").exists():
            assert b"evakernels_native" not in library.read_bytes()
            assert f"{metadata['id']}_native".encode() in library.read_bytes()
    assert len(names) == len(variants)


def test_hub_refuses_another_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    done = subprocess.run([sys.executable, ROOT / "tools/hub.py", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "--out" in done.stderr
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="kernels isn't installed: pip install kernels")
@pytest.mark.skipif(not _native.LOADED, reason="the compiled library isn't built")
def test_hub_layers_match_those_they_replace(repository: Path) -> None:
    """In a process that has imported evakernels, too."""
    done = subprocess.run([sys.executable, LAYERS, repository], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
