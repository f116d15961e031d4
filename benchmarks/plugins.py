"""Files of one's own that add peers and operations to those that ship."""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks.operation import operations, peers_of, registered_names
from evaclip.errors import UserError, unknown_name
from evakernels._names import hint


def load(plugins: Sequence[Path] = ()) -> None:
    """Registers the operations that ship, and runs the user's files, which register theirs.

    Raises:
        UserError: a file isn't there, is no Python, registers nothing, or names an operation that doesn't exist.
    """
    importlib.import_module("benchmarks.cases")
    for path in plugins:
        before = _counts()
        _run(path)
        new = [name for name, count in _counts().items() if count != before.get(name)]
        if not new:
            raise UserError(f"--plugin {str(path)!r} registers nothing; it needs a @peer(OPERATION, NAME)")
        for name in new:
            if name not in operations():
                raise UserError(f"--plugin {str(path)!r}: {unknown_name('operation', name, operations())}")


def _run(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--plugin {str(path)!r} isn't a Python file{hint(path, map(str, path.parent.glob('*.py')))}")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _counts() -> dict[str, tuple[bool, int]]:
    """By name whether there is an operation, and how many peers it has."""
    return {name: (name in operations(), len(peers_of(name))) for name in registered_names()}
