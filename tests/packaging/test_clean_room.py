"""The wheel and the source distribution in new environments, without the source tree and the tests' packages."""

import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from clean_room import BUILD_TOOLS, CHECK, PACKAGES, ROOT, Room, build, make_room, tracked, tracked_modules

SERVES = """
import uvicorn
from pathlib import Path
from evaclip import Encoder
from evaclip.runtime.store import Store
from evaclip.serve import create_app
create_app(Store.open(Path("runs/demo/pictures.store")), Encoder("runs/demo"))
"""
REFERENCES = {path.stem for path in (ROOT / "evakernels/reference").glob("[!_]*.py")}
FAMILIES = sorted(REFERENCES - {"adamw"})
"""The families with compiled CPU kernels."""
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("build")]


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tmp_path_factory.mktemp("sdist") / "dist")


@pytest.fixture(scope="session")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    """Only torch and numpy."""
    with closing(make_room(tmp_path_factory.mktemp("core"), wheel)) as room:
        yield room


@pytest.fixture(scope="session")
def clip(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    with closing(make_room(tmp_path_factory.mktemp("clip"), wheel, "clip")) as room:
        yield room


@pytest.fixture(scope="session")
def trained(clip: Room) -> Room:
    """The room `clip`, with a run in `runs/tiny`."""
    steps = ("schedule.steps=4", "schedule.warmup_steps=1", "batch_size=8", "eval.sets.shapes.samples=32")
    clip.output("evaclip", "train", "tiny", "--set", *steps)
    return clip


def missing_modules(room: Room) -> dict[str, str]:
    """The modules of both packages that can't be imported, with the package that each one misses."""
    found: dict[str, str] = json.loads(room.script("import_modules.py", *tracked_modules()))
    own = {name: package for name, package in found.items() if package.split(".")[0] in PACKAGES}
    assert own == {}, "not in the distribution"
    return found


def test_sdist_holds_the_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        *tracked("csrc", "ptx_interpreter", *PACKAGES),
        "CMakeLists.txt",
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
    }
    assert needed - names == set()
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/"))}


def test_with_the_core_alone_all_ops_are_imported(core: Room) -> None:
    assert "rich" not in core.distributions
    missing = missing_modules(core)
    assert {package for name, package in missing.items() if name.startswith("evakernels.")} <= {
        "PIL",
        "transformers",
        "triton",
    }
    assert {name for name in missing if name.startswith("evakernels.ops")} == set()


def test_extra_clip_imports_all_of_evaclip(clip: Room) -> None:
    """But for the two folders that are an extra's alone, and for the code of transformers' folders."""
    missing = {name: package for name, package in missing_modules(clip).items() if name.startswith("evaclip")}
    for code in ("modeling", "image_processing"):
        assert missing.pop(f"evaclip.weights.{code}_evaclip", "transformers") in ("torchvision", "transformers")
    assert {name.split(".")[1] for name in missing} <= {"serve"}
    assert set(missing.values()) <= {"onnx", "onnxruntime", "fastapi", "prometheus_client", "starlette"}


def test_ops_run_on_the_compiled_library(core: Room) -> None:
    assert json.loads(core.script(CHECK))["ops"] == FAMILIES


def test_a_model_is_accelerated(core: Room) -> None:
    assert "LayerNorm" in core.script("accelerate_model.py")


def test_every_command_shows_its_help(core: Room) -> None:
    shown = core.script("show_help.py").splitlines()
    assert {"evaclip", "evaclip train", "evaclip eval zero-shot", "evaclip doctor"} <= set(shown)


def test_doctor_finds_the_compiled_library(core: Room) -> None:
    facts = json.loads(core.output("evaclip", "doctor", "--json"))
    assert facts["native"]["loaded"] is True


def test_command_without_its_packages_names_the_extra(core: Room) -> None:
    result = core.run_script("ask_without_packages.py")
    assert result.returncode == 0, result.stderr
    answers, errors = result.stdout.splitlines(), result.stderr.splitlines()
    assert len(answers) == len(errors) == 9
    assert [answer for answer in answers if not answer.endswith(" 2")] == []
    remedy = r"error: the package [\w-]+ is not installed: pip install 'evakernels\[(clip|demo)\]'"
    assert [line for line in errors if not re.fullmatch(remedy, line)] == []
    assert "[demo]" in errors[answers.index("demo 2")]


def test_trained_model_is_reported(trained: Room) -> None:
    trained.output("evaclip", "report", "runs/tiny")
    assert (trained.work / "runs/tiny/report.html").stat().st_size > 10_000


def test_the_first_hour_with_dirty_data(trained: Room) -> None:
    trained.script("hour_of_data.py")


def test_the_first_hour_of_profiling(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with closing(make_room(tmp_path_factory.mktemp("bench"), wheel, "bench")) as room:
        # A checkout that nobody has compiled.
        shutil.copytree(ROOT / "benchmarks", room.work / "checkout/benchmarks")
        room.script("hour_of_profiling.py", room.work / "checkout")


@pytest.mark.exhaustive
def test_sdist_installs_without_a_compiler(sdist, tmp_path_factory):
    plain = make_room(tmp_path_factory.mktemp("plain"), sdist, tools=BUILD_TOOLS, EVAKERNELS_NATIVE="off")
    with closing(plain) as room:
        assert {name for name in missing_modules(room) if name.startswith("evakernels.ops")} == set()
        room.script("accelerate_model.py")


@pytest.mark.exhaustive
def test_the_source_distribution_compiles(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    # Not optimised, which takes a third of the time; the wheel is.
    settings = {"EVAKERNELS_NATIVE": "on", "EVAKERNELS_CUDA": "off", "CMAKE_BUILD_TYPE": "None"}
    compiled = make_room(tmp_path_factory.mktemp("compiled"), sdist, tools=BUILD_TOOLS, **settings)
    with closing(compiled) as room:
        assert json.loads(room.script(CHECK))["ops"] == FAMILIES


@pytest.mark.exhaustive
def test_the_extra_demo_is_all_that_the_demo_needs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    room = make_room(tmp_path_factory.mktemp("demo"), wheel, "demo")
    assert not room.distributions & {"scikit-learn", "tensorboard", "wandb"}
    # The pictures that the demo would draw itself, of a tenth of its pixels; to draw these takes most of its time.
    room.output("evaclip", "data", "emoji", "data/emoji", "--size", "20")
    printed = room.output("evaclip", "demo", "--budget-minutes", "0.01")
    assert (room.work / "runs/demo/report.html").exists()
    assert printed.splitlines()[-1] == "  evaclip serve runs/demo/pictures.store --open"
    room.output("python", "-c", SERVES)
