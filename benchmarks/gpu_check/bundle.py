"""What `make gpu-bundle` has compiled and fetched elsewhere, put where a machine without a network finds it.

A bundle is a folder with a `manifest.json`:

    csrc       `hash_of_sources()` of the tree that the libraries were compiled from
    commit     of that tree
    libraries  by name the SHA-256 of files that belong into `evakernels/`: _ops.so, _C.*.so, _build.json
    wheels     by name the SHA-256 of the packages that the machine lacks
"""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.origin import ROOT
from evaclip.atomic import replacing, writing
from evaclip.errors import UserError

_AGAIN = "run `make gpu-bundle` again"


@dataclass(frozen=True)
class Bundle:
    """A bundle that fits this tree, in its place.

    Attributes:
        hash: of the manifest.
        commit: that it was made of.
        packages: folder of the unpacked wheels, for PYTHONPATH.
    """

    hash: str = ""
    commit: str = ""
    packages: Path | None = None


def hash_of_sources(tree: Path = ROOT) -> str:
    """SHA-256 of CMakeLists.txt and of all files in csrc: their names, NUL, their bytes, NUL, in the order of names."""
    digest = hashlib.sha256()
    files = sorted(path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*") if path.is_file())
    for name in ["CMakeLists.txt", *files]:
        digest.update(name.encode() + b"\0" + (tree / name).read_bytes() + b"\0")
    return digest.hexdigest()


def install(folder: Path, tree: Path = ROOT) -> Bundle:
    """Puts the libraries into `evakernels/` and unpacks the wheels into `build/gpu-check-packages`.

    Raises:
        UserError: there is no bundle, a file of it is damaged, or it was made of other sources.
    """
    try:
        text = (folder / "manifest.json").read_bytes()
        manifest = json.loads(text)
        libraries, wheels = dict(manifest["libraries"]), dict(manifest["wheels"])
        made_of, commit = str(manifest["csrc"]), str(manifest.get("commit", ""))
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise UserError(f"{folder} is no bundle ({type(exc).__name__}: {exc}); {_AGAIN}") from exc
    if made_of != hash_of_sources(tree):
        raise UserError(f"{folder} was compiled from other sources than this tree's csrc; {_AGAIN}")
    _check(folder, libraries | wheels)
    with writing(tree / "evakernels"):
        for name in libraries:
            with replacing(tree / "evakernels" / name) as temporary:
                shutil.copyfile(folder / name, temporary)
    return Bundle(hashlib.sha256(text).hexdigest()[:16], commit, _unpack(folder, wheels, tree) if wheels else None)


def _check(folder: Path, hashes: Mapping[str, str]) -> None:
    for name, expected in hashes.items():
        try:
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as exc:
            raise UserError(f"{folder} lacks {name}: {exc.strerror}; {_AGAIN}") from exc
        if found != expected:
            raise UserError(f"{folder / name} is damaged: its SHA-256 isn't the manifest's; {_AGAIN}")


def _unpack(folder: Path, wheels: Mapping[str, str], tree: Path) -> Path:
    target = tree / "build/gpu-check-packages"
    with writing(target):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in wheels:
            with zipfile.ZipFile(folder / name) as wheel:
                wheel.extractall(target)
    return target
