"""Data flows one way: csrc -> evakernels -> evaclip's library -> its command line."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "evakernels").rglob("*.py"))
COMMANDS = ROOT / "evaclip" / "commands"
LIBRARY = sorted(
    path for path in (ROOT / "evaclip").rglob("*.py") if COMMANDS not in path.parents and path.name != "__main__.py"
)


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_kernels_know_nothing_of_the_models(path: Path) -> None:
    assert not {
        name
        for name in imported(path)
        if name.partition(".")[0] in ("evaclip", "benchmarks", "ptx_interpreter", "tests")
    }


def test_kernels_import_relatively() -> None:
    """So that the package can be renamed, as a build for the Hub does."""
    for path in KERNELS:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        assert not {name for name in modules if name.startswith("evakernels")}, path


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_library_knows_no_command_line(path: Path) -> None:
    names = imported(path)
    assert "argparse" not in names
    assert not {
        name for name in names if name.startswith(("evaclip.commands", "benchmarks", "ptx_interpreter", "tests"))
    }


def test_a_verb_imports_no_other_verb() -> None:
    shared = {f"evaclip.commands.{name}" for name in ("parser", "train")}  # plan describes a run like train
    for path in COMMANDS.glob("*.py"):
        others = {name for name in imported(path) if name.startswith("evaclip.commands.")}
        known = {name for name in others if (COMMANDS / f"{name.split('.')[2]}.py").is_file()}
        assert path.name == "main.py" or {".".join(name.split(".")[:3]) for name in known} <= shared, path.name
