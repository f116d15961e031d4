"""The build: with a compiler, without one, and with a broken one."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from clean_room import PACKAGES, ROOT, build, tracked
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from release import supported_pythons
from requirements import PROJECT, requirements

from evakernels import _native

SOURCES = ("setup.py", "CMakeLists.txt", "pyproject.toml", "MANIFEST.in", "LICENSE", "csrc")
ABSENT = "no-such-compiler"

# Runs in a folder that holds an unpacked wheel.
REPORT = """
import json, torch, evakernels
from evakernels._info import info
y = evakernels.layer_norm(torch.arange(8.0).reshape(2, 4))
print(json.dumps({"folder": evakernels.__file__, "native": info()["native"], "y": y.tolist()}))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the build reads, without what earlier builds left."""
    target = tmp_path / "project"
    target.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name)
        else:
            shutil.copy(ROOT / name, target / name)
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    return target


def run_setup(project: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command of setup.py, which is quicker than a wheel."""
    python = [sys.executable, "setup.py", command]
    return subprocess.run(python, cwd=project, env=os.environ | environment, capture_output=True, text=True)


def report_of(wheel: Path, folder: Path) -> dict:
    """What `REPORT` says when it is run on the wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    result = subprocess.run(
        [sys.executable, "-c", REPORT], cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert Path(report["folder"]).is_relative_to(folder), "the report is not of this wheel"
    return report


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def package_files(wheel: Path) -> set[str]:
    """The files of a wheel without its metadata and compiled files."""
    made = r"[^/]*\.dist-info/.*|evakernels/(_build\.json|_ops\.so|_C\..*\.so)"
    return {name for name in names_in(wheel) if not re.fullmatch(made, name)}


def test_library_is_loaded_where_it_can_be_built() -> None:
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    assert _native.LOADED, _native.REASON


@pytest.mark.slow
def test_switched_off_build_is_pure_python(project: Path, tmp_path: Path) -> None:
    wheel = build("wheel", tmp_path / "dist", project, EVAKERNELS_NATIVE="off")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert package_files(wheel) == tracked(*PACKAGES)
    names = names_in(wheel)
    assert "evakernels/_build.json" in names
    assert not [name for name in names if name.endswith((".so", ".cpp"))]
    report = report_of(wheel, tmp_path / "unpacked")
    assert report["native"]["loaded"] is False
    assert report["native"]["reason"] == "not built: switched off by EVAKERNELS_NATIVE=off"
    assert report["y"][0] == pytest.approx([-1.3416, -0.4472, 0.4472, 1.3416], abs=1e-4)


@pytest.mark.slow
@pytest.mark.xdist_group("build")
@pytest.mark.skipif(not _native.LOADED, reason=f"the native library can't be built here: {_native.REASON}")
def test_wheel_with_native_library(wheel: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    assert package_files(wheel) == tracked(*PACKAGES)
    names = names_in(wheel)
    assert {"evakernels/_ops.so", "evakernels/_build.json"} <= names
    assert len([name for name in names if re.fullmatch(r"evakernels/_C\..*\.so", name)]) == 1
    native = report_of(wheel, unpacked)["native"]
    assert native["loaded"] is True
    assert native["reason"] is None
    assert native["isa"] == native["isas_available"][-1]
    assert native["version"] == wheel.name.split("-")[1]
    assert_runs_under_any_python(unpacked / "evakernels/_ops.so")
    assert_module_takes_kernels_from_library(unpacked / "evakernels")
    assert_instruction_sets_share_no_symbol(ROOT / "build" / f"cmake-{sys.implementation.cache_tag}")


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def assert_module_takes_kernels_from_library(package: Path) -> None:
    (module,), library = package.glob("_C.*.so"), package / "_ops.so"
    places = {
        path: re.findall(r"R(?:UN)?PATH.*\[(.*)\]", output_of("readelf", "-d", path)) for path in (module, library)
    }
    assert places == {module: ["$ORIGIN"], library: []}
    functions = set(re.findall(r" U (_ZN10evakernels\w+)", output_of("nm", "-D", module)))
    assert any("active_isa" in name for name in functions)
    assert functions <= set(re.findall(r" T (_ZN10evakernels\w+)", output_of("nm", "-D", library)))
    assert not re.findall(r" [tT] _ZN10evakernels\w+", output_of("nm", "-D", module))
    library.unlink()
    code = "import evakernels; print(evakernels.info()['native']['reason']); import evakernels._C"
    done = subprocess.run([sys.executable, "-c", code], cwd=package.parent, capture_output=True, text=True, check=False)
    assert done.stdout == f"not built: {library} does not exist\n"
    assert "ImportError: _ops.so: cannot open shared object file" in done.stderr


def assert_runs_under_any_python(library: Path) -> None:
    # The symbols of the C and C++ runtimes have versions. libtorch's stable ABI is these C functions alone.
    symbols = re.findall(r" U (\w+)$", output_of("nm", "-D", library), flags=re.MULTILINE)
    assert "torch_parallel_for" in symbols
    assert not [name for name in symbols if not name.startswith(("aoti_torch_", "torch_"))]


def assert_instruction_sets_share_no_symbol(build: Path) -> None:
    """A weak symbol in these objects could make baseline code call an AVX-512 copy."""
    objects = list(build.glob("CMakeFiles/kernels_*.dir/csrc/cpu/*.o"))
    assert objects
    for path in objects:
        symbols = output_of("nm", path)
        assert not re.findall(r"^\w* [uvVwW] .*", symbols, flags=re.MULTILINE), path


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"EVAKERNELS_NATIVE": "on", "CXX": ABSENT}, "error: no C++ compiler found"),
        ({"CXX": ABSENT}, "error: no C++ compiler found"),
        ({"EVAKERNELS_CUDA": "on", "CUDACXX": ABSENT}, "EVAKERNELS_CUDA=on, but no CUDA compiler found"),
        ({"EVAKERNELS_CUDA": "yes"}, "EVAKERNELS_CUDA must be one of auto, on, off, got 'yes'"),
        ({"EVAKERNELS_NATIVE": "maybe"}, "EVAKERNELS_NATIVE must be one of auto, on, off, got 'maybe'"),
    ],
)
def test_refused_build(project: Path, environment: dict[str, str], message: str) -> None:
    result = run_setup(project, "build", **environment)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_build_tools_are_an_error(tmp_path: Path) -> None:
    """A new environment that has setuptools alone."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "new"], check=True)
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / name).symlink_to(Path(importlib.import_module(name).__file__).parent)
    command = [tmp_path / "new/bin/python", ROOT / "setup.py", "--version"]
    environment = {"PATH": os.defpath, "CXX": "true", "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "torch, pybind11" in result.stderr
    assert "pip install torch setuptools cmake ninja pybind11" in result.stderr
    assert "EVAKERNELS_NATIVE=off" in result.stderr


def test_broken_compiler_fails_the_build(project: Path) -> None:
    result = run_setup(project, "build", CXX="/bin/false")
    assert result.returncode != 0
    assert "compiler" in result.stdout + result.stderr


def test_switched_off_build_removes_a_stale_library(project: Path) -> None:
    stale = [project / file for file in ("evakernels/_ops.so", "evakernels/_C.cpython-311-x86.so")]
    for path in stale:
        path.touch()
    result = run_setup(project, "editable_wheel", EVAKERNELS_NATIVE="off")
    assert result.returncode == 0, result.stderr
    assert not [path for path in stale if path.exists()]
    record = json.loads((project / "evakernels/_build.json").read_text())
    reason = "switched off by EVAKERNELS_NATIVE=off"
    nothing = {"native": False, "cuda": False, "cuda_archs": [], "cuda_release": None, "cuda_codes": []}
    assert record == nothing | {"reason": reason, "cuda_reason": reason}


def test_headers_keep_to_their_side() -> None:
    """Kernels know neither torch nor Python; the operators use the stable part of libtorch only."""
    for folder in ("common", "cpu", "cuda", "include"):
        for path in (ROOT / "csrc" / folder).glob("*.*"):
            assert not re.findall(r'#include [<"](torch|ATen|c10|pybind11|Python)', path.read_text()), path
    # One PTX serves several GPUs: only launch bounds of norms depend on the architecture.
    by_architecture = [path.name for path in (ROOT / "csrc/cuda").glob("*.*") if "__CUDA_ARCH" in path.read_text()]
    assert by_architecture == ["norm_launch.h"]
    bindings = "".join(path.read_text() for path in (ROOT / "csrc/bind").glob("*.*"))
    included = re.findall(r"#include <((?:torch|ATen|c10)/\S+)>", bindings)
    assert included
    # The shims are the C functions of libtorch that the stable part itself is built on.
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/generated/c_shim_")
    assert all(name.startswith(stable) for name in included)


def test_makefile_installs_what_the_build_requires() -> None:
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    (tools,) = re.findall(r"^BUILD_TOOLS := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = {re.split(r"[<>=!~ ]", requirement)[0] for requirement in requires}
    assert named - {"torch"} <= set(tools.split())


@pytest.mark.parametrize("version", supported_pythons())
def test_constraints_pin_all_requirements(version: str) -> None:
    """Fails where `make update` is missing after a change of pyproject.toml."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    python = {"python_version": version, "python_full_version": f"{version}.9"}
    applying = [line for line in map(Requirement, lines) if not line.marker or line.marker.evaluate(python)]
    locked = {line.name: line.specifier for line in applying}
    assert len(locked) == len(applying)
    build_requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    extras = set().union(*map(requirements, PROJECT["optional-dependencies"]))
    for requirement in map(Requirement, {*build_requires, *PROJECT["dependencies"], *extras}):
        if requirement.name not in ("torch", "torchvision", "triton"):
            (pin,) = locked[canonicalize_name(requirement.name)]
            assert pin.operator == "==", requirement
            assert requirement.specifier.contains(pin.version), requirement
