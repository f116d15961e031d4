"""What `make gpu-bundle` carries to a machine that has a GPU and no network: compiled libraries and wheels.

    manifest.json         what the rest is, and for whom it was made
    libraries/            _ops.so, _C.*.so and _build.json, for the folder evakernels/ of a checkout
    wheels/               packages that such a machine lacks, and the peers
    hunters/              programs that drive the kernels under NVIDIA's sanitizers; may be missing
    predictions.json      what the roofline predicts of their times; may be missing

No module but the standard library's is needed to read it, as the packages that others need are in it.
"""

import hashlib
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from evaclip.atomic import replacing, writing
from evaclip.errors import UserError

MANIFEST = "manifest.json"
SCHEMA = 1
AGAIN = "run `make gpu-bundle` again"
_COMPILED = (".h", ".cpp", ".cu", ".cuh")


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are as they were written.

    Attributes:
        folder: where it is.
        schema: of the manifest.
        made: date and time, UTC.
        commit: of the checkout that it was made from, with `-dirty` behind it where that had other changes.
        sources: `sources_hash` of that checkout.
        python: the version that `_C` is for, as `3.12`.
        torch: the oldest version that `_ops.so` is for, as `2.11`.
        archs: the GPUs that there are kernels for, as CMake spells them: `90-real`.
        nvcc: the release that compiled them.
        files: size in bytes and SHA-256 by path.
        packages: version and size in bytes of the wheels, by the name of the distribution.
        left_out: why there is no wheel of a package, no program or no predictions.
    """

    folder: Path
    schema: int
    made: str
    commit: str
    sources: str
    python: str
    torch: str
    archs: list[str]
    nvcc: str
    files: dict[str, dict[str, Any]]
    packages: dict[str, dict[str, Any]]
    left_out: dict[str, str]

    @property
    def name(self) -> str:
        """Twelve digits that no other bundle has."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()[:12]

    @property
    def hunters(self) -> list[Path]:
        """The programs of hunters/."""
        return self._in("hunters")

    def check(self, tree: Path) -> None:
        """Raises UserError where it isn't for this Python, this torch, or the kernels of this checkout."""
        if self.sources != sources_hash(tree):
            raise UserError(f"the kernels changed since the bundle was made, of {self.commit}; {AGAIN}")
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        if self.python != here:
            raise UserError(f"the bundle is for Python {self.python}, this is {here}; {AGAIN} with GPU_PYTHON={here}")
        try:
            torch = metadata.version("torch")
        except metadata.PackageNotFoundError:
            raise UserError(f"there is no torch here, and none in the bundle; it needs {self.torch} or later") from None
        if _numbers(torch) < _numbers(self.torch):
            raise UserError(f"the bundle is for torch {self.torch} or later, this is {torch}")

    def check_gpu(self, major: int, minor: int) -> None:
        """Raises UserError where none of the kernels runs on a GPU of this compute capability."""
        gpu = 10 * major + minor
        if not any(_serves(arch, gpu) for arch in self.archs):
            made = ", ".join(self.archs)
            raise UserError(f"the bundle's kernels are for {made}, the GPU is of {gpu}; {AGAIN} with GPU_ARCHS={gpu}")

    def install(self, tree: Path, site: Path) -> None:
        """Copies the libraries into a checkout, and unpacks the wheels.

        Args:
            tree: the checkout; libraries in its folder evakernels/ are replaced.
            site: a folder of packages for PYTHONPATH. It is made anew where it isn't of this bundle already.
        """
        with writing(tree / "evakernels"):
            for path in self._in("libraries"):
                with replacing(tree / "evakernels" / path.name) as temporary:
                    shutil.copy(path, temporary)
            for program in self.hunters:
                program.chmod(0o755)
        with writing(site):
            self._unpack(site)

    def _unpack(self, site: Path) -> None:
        mark = site / ".bundle"
        if mark.is_file() and mark.read_text() == self.name:
            return
        temporary = site.with_name(f".{site.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for wheel in self._in("wheels"):
            unpack(wheel, temporary)
        (temporary / mark.name).write_text(self.name)
        shutil.rmtree(site, ignore_errors=True)
        temporary.replace(site)

    def _in(self, folder: str) -> list[Path]:
        return [self.folder / path for path in self.files if path.startswith(f"{folder}/")]


def read(folder: Path) -> Bundle:
    """The bundle in a folder.

    Raises:
        UserError: there is none, it is of another schema, or a file is missing or damaged.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no bundle: there is no {MANIFEST} in it; run `make gpu-bundle`") from None
    except OSError as exc:
        raise UserError(f"cannot read {folder / MANIFEST}: {exc.strerror}") from exc
    except ValueError:
        raise UserError(f"{folder / MANIFEST} is damaged: it isn't JSON; {AGAIN}") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{folder / MANIFEST} is of schema {schema}, known is {SCHEMA}; {AGAIN}")
    if missing := {field.name for field in fields(Bundle)} - {"folder"} - set(found):
        raise UserError(f"{folder / MANIFEST} is damaged: it has no {', '.join(sorted(missing))}; {AGAIN}")
    bundle = Bundle(folder=folder, **{field.name: found[field.name] for field in fields(Bundle)[1:]})
    for path, told in bundle.files.items():
        _verify(folder, path, told)
    return bundle


def _verify(folder: Path, path: str, told: dict[str, Any]) -> None:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise UserError(f"{folder / MANIFEST} is damaged: it names {path}, which lies elsewhere; {AGAIN}")
    try:
        here = fingerprint(folder / path)
    except OSError as exc:
        raise UserError(f"the bundle {folder} lacks {path}: {exc.strerror}; copy it whole, or {AGAIN}") from exc
    if here["bytes"] != told["bytes"]:
        raise UserError(f"{folder / path} is damaged: {here['bytes']} bytes of {told['bytes']}; copy it again")
    if here["sha256"] != told["sha256"]:
        raise UserError(f"{folder / path} is damaged: its SHA-256 isn't that of the manifest; copy it again")


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def sources_hash(tree: Path) -> str:
    """SHA-256 of what the compiled libraries of a checkout are made of: CMakeLists.txt and the code in csrc/."""
    digest = hashlib.sha256()
    for path in [tree / "CMakeLists.txt", *_sources(tree / "csrc")]:
        digest.update(f"{path.relative_to(tree).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.suffix in _COMPILED)


def unpack(wheel: Path, site: Path) -> None:
    """Unpacks the packages of a wheel into a folder; programs, headers and other data are left out."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            data = re.match(r"[^/]+\.data/([^/]+)/", entry.filename)
            if data and data[1] not in ("purelib", "platlib"):
                continue
            entry.filename = entry.filename[data.end() if data else 0 :]
            if entry.filename:
                archive.extract(entry, site)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:2]))


def _serves(arch: str, gpu: int) -> bool:
    """Machine code runs on GPUs of the same major version and no older minor one; PTX on all that aren't older."""
    number = int(arch.partition("-")[0])
    machine_code = not arch.endswith("-virtual") and number // 10 == gpu // 10 and number <= gpu
    return machine_code or (not arch.endswith("-real") and number <= gpu)
