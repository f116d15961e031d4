"""tests/cuda/budget.py, a script outside of all packages."""

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


@cache
def budget() -> ModuleType:
    """The module."""
    spec = importlib.util.spec_from_file_location("budget", ROOT / "tests/cuda/budget.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
