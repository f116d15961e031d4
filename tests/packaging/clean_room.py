"""New virtual environments with a distribution of this project, its declared requirements, and nothing else.

Requirements aren't installed again: a room's site-packages link to the tests' packages, as far as the metadata of the
distribution and of its requirements name them. pip then finds each requirement, or fails. A room costs seconds, and has
neither undeclared requirements nor the editable installation.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from build_wheel import write_settings
from packaging.requirements import Requirement
from requirements import PROJECT, requirements

ROOT = Path(__file__).parents[2]
PACKAGES = ("evakernels", "evaclip")
SCRIPTS = Path(__file__).with_name("in_room")
CHECK = ROOT / "tools/wheel_check.py"
BUILD_TOOLS = ("setuptools", "wheel", "cmake", "ninja", "pybind11")
COMPILER_SETTINGS = ("CXX", "CUDACXX", "EVAKERNELS_CUDA", "EVAKERNELS_NATIVE")


@dataclass(frozen=True)
class Room:
    """A virtual environment, and a folder to work in that is neither the source tree nor above it."""

    folder: Path
    distributions: frozenset[str]
    """Names of the linked distributions on PyPI."""

    @property
    def python(self) -> Path:
        return self.folder / "env/bin/python"

    @cached_property
    def work(self) -> Path:
        folder = self.folder / "work"
        folder.mkdir(exist_ok=True)
        return folder

    @cached_property
    def environment(self) -> dict[str, str]:
        """Environment variables of programs in the room."""
        path = os.pathsep.join([str(self.python.parent), "/usr/bin", "/bin"])
        return {"PATH": path, "HOME": str(self.work), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}

    def output(self, *command: object) -> str:
        """Run a program in the room and return its output."""
        result = subprocess.run(
            list(map(str, command)), cwd=self.work, env=self.environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-5000:]}{result.stderr[-5000:]}"
        return result.stdout

    @cached_property
    def _host(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.python, "-I", SCRIPTS / "host.py"],
            cwd=self.work,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run_script(self, file: str | Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a script, such as one of `in_room`, without the script's folder on its path; torch is imported."""
        words = [str(SCRIPTS / file), *map(str, arguments)]
        self._host.stdin.write(json.dumps(words) + "\n")
        self._host.stdin.flush()
        return subprocess.CompletedProcess(words, *json.loads(self._host.stdout.readline()))

    def script(self, file: str | Path, *arguments: object) -> str:
        """Run a script and return its output."""
        result = self.run_script(file, *arguments)
        assert result.returncode == 0, f"{result.args}\n{result.stdout[-5000:]}{result.stderr[-5000:]}"
        return result.stdout

    def close(self) -> None:
        """End the programs of the room."""
        if "_host" in self.__dict__:
            self._host.communicate()


def make_room(folder: Path, archive: Path, extra: str = "", tools: tuple[str, ...] = (), **environment: str) -> Room:
    """A new environment in `folder` with `archive`, a wheel or a source distribution, installed by pip.

    `extra` is the extra to install with it, `tools` what must be there for a build; `environment` holds for pip.
    """
    env = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    declared = [*PROJECT["dependencies"], *(requirements(extra) if extra else ())]
    wanted = [Requirement(text) for text in (*tools, *declared)]
    distributions = {found.name: found for found in _closure(wanted)}
    (site,) = env.glob("lib/python*/site-packages")
    for found in distributions.values():
        _link(found, site, env / "bin")
    asked = f"{archive}[{extra}]" if extra else archive
    pip = [sys.executable, "-m", "pip", "--python", env, "install", "--no-index", "--no-build-isolation", asked]
    clean = {name: value for name, value in os.environ.items() if name not in (*COMPILER_SETTINGS, "PYTHONPATH")}
    result = subprocess.run(list(map(str, pip)), env=clean | environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    return Room(folder, frozenset(distributions))


def tracked(*folders: str) -> set[str]:
    """The files under these folders in git, including new ones."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def tracked_modules() -> list[str]:
    """The names by which the tracked Python files of both packages are imported."""
    files = sorted(name for name in tracked(*PACKAGES) if name.endswith(".py"))
    return [re.sub(r"(/__init__)?\.py$", "", name).replace("/", ".") for name in files]


def build(kind: str, target: Path, project: Path = ROOT, **environment: str) -> Path:
    """A "wheel" or an "sdist" of the project in `target`, made by setuptools as pip would call it."""
    target.mkdir(parents=True)
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(target)!r})"
    clean = {name: value for name, value in os.environ.items() if name not in COMPILER_SETTINGS}
    command = [sys.executable, "-c", code]
    environment = clean | {"DIST_EXTRA_CONFIG": write_settings(target)} | environment
    result = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    (built,) = [path for path in target.iterdir() if path.name.endswith((".whl", ".tar.gz"))]
    return built


def _closure(wanted: list[Requirement]) -> list[metadata.Distribution]:
    """The installed distributions of these requirements, and of their requirements in turn."""
    found: dict[str, metadata.Distribution] = {}
    pending = [(requirement.name, extra) for requirement in wanted for extra in ("", *requirement.extras)]
    seen = set(pending)
    while pending:
        name, extra = pending.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # pip says so, if it is missed
        found[name] = distribution
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                new = {(requirement.name, further) for further in ("", *requirement.extras)} - seen
                seen |= new
                pending += new
    return list(found.values())


def _link(distribution: metadata.Distribution, site: Path, programs: Path) -> None:
    """Links the files of an installed distribution into another site-packages, folders as one."""
    files: Any = distribution.files or ()
    for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
        source = Path(str(distribution.locate_file(top)))
        if source.exists() and not (site / top).exists():
            (site / top).symlink_to(source)
    for file in files:
        if file.parts[0] == ".." and file.parent.name == "bin" and not (programs / file.name).exists():
            (programs / file.name).symlink_to(Path(str(distribution.locate_file(file))).resolve())
