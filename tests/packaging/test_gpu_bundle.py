"""What travels to a machine that has a GPU and no network: how it is put together, and how it is read there."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.gpu_check import bundle
from evaclip.errors import UserError

ROOT = Path(__file__).parents[2]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
MODULE = f"_C.cpython-{sys.version_info.major}{sys.version_info.minor}-x86_64-linux-gnu.so"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/gpu_bundle.py, which has its neighbours on the path as a script has."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import gpu_bundle
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return gpu_bundle


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout of little code, with a library of an earlier build."""
    folder = tmp_path / "tree"
    (folder / "csrc/cuda").mkdir(parents=True)
    (folder / "evakernels").mkdir()
    (folder / "CMakeLists.txt").write_text("project(kernels)")
    (folder / "csrc/cuda/norm.cu").write_text("__global__ void norm();")
    (folder / "csrc/cuda/README.md").write_text("")
    (folder / "evakernels/_ops.so").write_text("stale")
    return folder


def write_wheel(path: Path, files: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


@pytest.fixture
def folder(tool: ModuleType, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of that checkout, with one wheel and a program."""
    target = tmp_path / "bundle"
    for name in ("libraries/_ops.so", f"libraries/{MODULE}", "libraries/_build.json", "hunters/drive_gpu"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(f"new {name}")
    files = {"tiny/__init__.py": "answer = 42", "tiny-1.2.data/purelib/more.py": "", "tiny-1.2.data/scripts/run": ""}
    write_wheel(target / "wheels/tiny_lib-1.2-py3-none-any.whl", files)
    monkeypatch.setattr(tool, "ROOT", tree)
    told = {"python": PYTHON, "archs": ["90-real"], "nvcc": "13.0.88", "left_out": {"apex": "no wheel"}}
    tool.write_manifest(target, **told)
    return target


def refusal(function: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_bundle_is_read_as_it_was_written(folder: Path, tree: Path) -> None:
    found = bundle.read(folder)
    assert set(found.files) == {
        *("libraries/_ops.so", f"libraries/{MODULE}", "libraries/_build.json"),
        *("wheels/tiny_lib-1.2-py3-none-any.whl", "hunters/drive_gpu"),
    }
    assert found.packages["tiny-lib"]["version"] == "1.2"
    assert (found.torch, found.left_out, len(found.name)) == ("2.11", {"apex": "no wheel"}, 12)
    found.check(tree)


def test_it_is_installed_into_a_checkout_and_a_folder_of_packages(folder: Path, tree: Path, tmp_path: Path) -> None:
    found, site = bundle.read(folder), tmp_path / "site"
    found.install(tree, site)
    assert (tree / "evakernels/_ops.so").read_text() == "new libraries/_ops.so"
    assert (tree / "evakernels" / MODULE).exists()
    assert sorted(path.name for path in site.iterdir()) == [".bundle", "more.py", "tiny"]
    assert [os.access(path, os.X_OK) for path in found.hunters] == [True]


def test_packages_are_unpacked_once_for_each_bundle(folder: Path, tree: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    bundle.read(folder).install(tree, site)
    (site / "tiny/mark").touch()
    bundle.read(folder).install(tree, site)
    assert (site / "tiny/mark").exists()
    (site / ".bundle").write_text("another")
    bundle.read(folder).install(tree, site)
    assert not (site / "tiny/mark").exists()


def edit(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "holds no bundle: there is no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text('{"schema":'), "isn't JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "schema None, known is 1"),
        (lambda folder: (folder / "manifest.json").write_text('{"schema": 1}'), "it has no archs, commit, files"),
        (lambda folder: edit(folder, schema=99), "schema 99, known is 1"),
        (lambda folder: edit(folder, files={"../x": {}}), "names ../x, which lies elsewhere"),
        (lambda folder: (folder / "libraries/_ops.so").unlink(), "lacks libraries/_ops.so: No such file"),
        (lambda folder: (folder / "libraries/_ops.so").write_text("new"), "_ops.so is damaged: 3 bytes of 21"),
        (lambda folder: (folder / "libraries/_ops.so").write_text("New libraries/_ops.so"), "its SHA-256 isn't"),
    ],
)
def test_each_kind_of_damage_has_its_line(folder: Path, damage: Callable[[Path], object], told: str) -> None:
    damage(folder)
    assert told in refusal(bundle.read, folder)


def test_kernels_that_changed_since_are_noticed(folder: Path, tree: Path) -> None:
    found = bundle.read(folder)
    (tree / "csrc/cuda/README.md").write_text("[]")  # nothing is compiled of it
    found.check(tree)
    (tree / "csrc/cuda/norm.cu").write_text("__global__ void other();")
    assert "the kernels changed since" in refusal(found.check, tree)
    assert "run `make gpu-bundle` again" in refusal(found.check, tree)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"python": "3.9"}, f"is for Python 3.9, this is {PYTHON}"),
        ({"torch": "99.1"}, "is for torch 99.1 or later, this is"),
    ],
)
def test_a_bundle_for_another_machine_is_refused(folder: Path, tree: Path, values: dict, told: str) -> None:
    edit(folder, **values)
    assert told in refusal(bundle.read(folder).check, tree)


@pytest.mark.parametrize(
    ("archs", "served", "refused"),
    [
        (["90-real"], [(9, 0)], [(8, 0), (10, 0)]),
        (["80-real"], [(8, 0), (8, 6)], [(9, 0)]),
        (["90"], [(9, 0), (10, 0)], [(8, 0)]),
        (["90-virtual"], [(9, 0), (12, 0)], [(8, 9)]),
        (["90-real", "120-real"], [(9, 0), (12, 0), (12, 1)], [(10, 0)]),
    ],
)
def test_a_gpu_without_kernels_is_told(folder: Path, archs: list[str], served: list, refused: list) -> None:
    edit(folder, archs=archs)
    found = bundle.read(folder)
    for gpu in served:
        found.check_gpu(*gpu)
    for major, minor in refused:
        assert f"with GPU_ARCHS={major}{minor}" in refusal(found.check_gpu, major, minor)


# --- making ---------------------------------------------------------------------------------------------------------


def fill(sizes: dict[str, int | str]) -> Callable[..., str]:
    """A `download` that writes wheels of these sizes, or fails with the reason that stands there."""

    def download(python: Path, version: str, group: object, folder: Path) -> str:
        name = group.names[0]  # type: ignore[attr-defined]
        size = sizes.get(name, 10)
        if isinstance(size, str):
            return size
        folder.mkdir()
        (folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl").write_bytes(b"x" * size)
        return ""

    return download


def wheels_in(target: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in (target / "wheels").iterdir()}


def test_the_least_valuable_peers_are_left_out(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "download", fill({"xformers": 500, "cut-cross-entropy": "no such wheel"}))
    left_out = tool.add_wheels(Path("python"), "3.12", tmp_path, room=100)
    assert {"pydantic", "open_clip_torch", "liger_kernel", "flash_attn_4"} <= wheels_in(tmp_path)
    assert left_out["xformers"] == "0.0 MiB with what it needs, and 0.0 are left"
    assert left_out["cut-cross-entropy"] == "no such wheel"
    assert "apex" in left_out
    assert not wheels_in(tmp_path) & {"xformers", "cut_cross_entropy"}


@pytest.mark.parametrize("size", ["no such wheel", 500])
def test_what_the_check_needs_is_not_left_out(tool, tmp_path, monkeypatch, size):
    monkeypatch.setattr(tool, "download", fill({"pydantic": size}))
    with pytest.raises(SystemExit, match="error: the check needs pydantic"):
        tool.add_wheels(Path("python"), "3.12", tmp_path, room=100)


def test_predictions_are_made_for_the_gpu_of_the_bundle(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    assert "`make test` sets up" in tool.add_predictions("90-real", tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n[ $3 = sm_90 ] || { echo no rates >&2; exit 1; }\necho {} > $4\n")
    python.chmod(0o755)
    assert tool.add_predictions("120-real", tmp_path) == "no rates"
    assert tool.add_predictions("90-real", tmp_path) == ""
    assert (tmp_path / "predictions.json").read_text() == "{}\n"


def test_of_what_pip_says_the_last_error_is_told(tool: ModuleType) -> None:
    assert tool.last_error("WARNING: old\nERROR: from versions: none\nERROR: No match\n[notice]\n") == "No match"
    assert tool.last_error("") == "pip failed without a word"


def test_a_bundle_that_could_not_be_finished_leaves_the_former_one(tool, folder, monkeypatch):
    def fail(*arguments: object) -> None:
        raise SystemExit("error: the compiler failed")

    monkeypatch.setattr(tool, "with_tools", lambda version, interpreter: interpreter)
    monkeypatch.setattr(tool, "check_build", lambda python, archs: None)
    monkeypatch.setattr(tool, "make", fail)
    monkeypatch.setattr(sys, "argv", ["gpu_bundle.py", "--python", sys.executable, "--out", str(folder)])
    with pytest.raises(SystemExit, match="the compiler failed"):
        tool.main()
    bundle.read(folder)
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_of_a_failed_phase_the_compilers_errors_are_shown(tool, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="error: sh ended with 3"), tool.phase("Compiling"):
        subprocess.run(["sh", "-c", "echo 'x.cu:1: error: no such kernel'; echo noise; exit 3"], check=True)
    out, err = capfd.readouterr()
    assert out == "· Compiling ...\nx.cu:1: error: no such kernel\n"
    assert err.startswith("✗ Compiling failed after 0 s")


def run(*arguments: object, **environment: str) -> str:
    """What make's command says where it can't begin."""
    command = [sys.executable, ROOT / "tools/gpu_bundle.py", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_python_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert run("--python", "3.97") == "error: no python3.97 on PATH, and none given by --python\n"
    assert "doesn't run: " in run("--python", tmp_path / "python")
    other = tmp_path / "python3.98"
    other.symlink_to(sys.executable)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    assert f"python3.98 is Python {PYTHON}" in run("--python", "3.98", PATH=path)


def test_without_nvcc_one_line_says_so() -> None:
    told = run("--python", sys.executable, CUDACXX="no-such-nvcc")
    assert told == "error: EVAKERNELS_CUDA=on, but no CUDA compiler found (looked for no-such-nvcc)\n"
