"""Imports of the kernels; `make lint` checks the layers."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "evakernels").rglob("*.py"))


def test_kernels_import_relatively() -> None:
    """A build for the Hub renames the package."""
    for path in KERNELS:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        assert not {name for name in modules if name.startswith("evakernels")}, path
