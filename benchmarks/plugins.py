"""Files of one's own that add peers and operations to those that ship."""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks.operation import registered
from evaclip.errors import UserError, hint


def load(plugins: Sequence[Path] = ()) -> None:
    """Registers the operations that ship, and runs the user's files, which register theirs.

    Raises:
        UserError: a file isn't there, can't be run, registers nothing, or names an operation that doesn't exist.
    """
    importlib.import_module("benchmarks.cases")
    for path in plugins:
        before = registered()
        _run(path)
        if registered() == before:
            raise UserError(f"--plugin {str(path)!r} registers nothing; it needs a @peer(OPERATION, NAME)")


def _run(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--plugin {str(path)!r} isn't a Python file{hint(path, map(str, path.parent.glob('*.py')))}")
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except (Exception, SystemExit) as exc:
        raise UserError(f"--plugin {str(path)!r} ends with {type(exc).__name__}: {exc}") from exc
