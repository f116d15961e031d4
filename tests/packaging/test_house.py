"""Data flows one way: csrc -> evakernels -> evaclip's library -> its command line."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "evakernels").rglob("*.py"))
COMMANDS = ROOT / "evaclip" / "commands"
TOOLS = {"benchmarks", "ptx_interpreter", "tests"}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_kernels_do_not_import_evaclip() -> None:
    for path in KERNELS:
        assert not {name.partition(".")[0] for name in imported(path)} & ({"evaclip"} | TOOLS), path


def test_kernels_import_relatively() -> None:
    """A build for the Hub renames the package."""
    for path in KERNELS:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        assert not {name for name in modules if name.startswith("evakernels")}, path


def test_library_does_not_import_commands() -> None:
    for path in (ROOT / "evaclip").rglob("*.py"):
        if COMMANDS not in path.parents and path.name != "__main__.py":
            names = imported(path)
            assert "argparse" not in names, path
            assert not {name for name in names if name.startswith(("evaclip.commands", *TOOLS))}, path


def test_verb_does_not_import_another_verb() -> None:
    shared = {f"evaclip.commands.{name}" for name in ("parser", "train")}  # plan describes a run like train
    for path in COMMANDS.glob("*.py"):
        others = {name for name in imported(path) if name.startswith("evaclip.commands.")}
        known = {name for name in others if (COMMANDS / f"{name.split('.')[2]}.py").is_file()}
        assert path.name == "main.py" or {".".join(name.split(".")[:3]) for name in known} <= shared, path.name
