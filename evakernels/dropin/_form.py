"""Whether a function of another library is one that this package knows: a fingerprint of its source.

`forms.json` holds the fingerprints of every function that a rule stands in for, by library version. A library whose
function reads differently, be it a newer version or a patch at run time, is detected and left alone.
`python -m evakernels.dropin FOLDER...` adds those of more versions.
"""

import ast
import hashlib
import inspect
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

FORMS = Path(__file__).with_name("forms.json")
_IGNORED = frozenset({"annotation", "returns", "type_comment", "type_params", "ctx", "kind"})


def fingerprint(source: str) -> str:
    """Of a function's source: comments, docstrings and annotations don't count.

    It is made of the syntax tree's non-empty fields, which read the same in every version of Python.
    """
    # A docstring may stand to the left of the code, so the source of a method can't be dedented.
    outer: Any = ast.parse("if True:\n" + source if source[:1].isspace() else source).body[0]
    function = outer.body[0] if isinstance(outer, ast.If) else outer
    if isinstance(function, ast.FunctionDef) and ast.get_docstring(function, clean=False) is not None:
        function.body = function.body[1:]
    return hashlib.sha256(repr(_plain(function)).encode()).hexdigest()[:16]


def is_known(function: Callable[..., Any] | None, name: str) -> bool:
    """Whether `function` is one of the known forms of `name`."""
    return function is not None and _of(function) in _known().get(name, {})


@cache
def _of(function: Callable[..., Any]) -> str | None:
    try:
        return fingerprint(inspect.getsource(function))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None


@cache
def _known() -> dict[str, dict[str, str]]:
    known: dict[str, dict[str, str]] = json.loads(FORMS.read_text())
    return known


def _plain(node: Any) -> Any:
    if isinstance(node, ast.AST):
        fields = ((name, _plain(value)) for name, value in ast.iter_fields(node) if name not in _IGNORED)
        return type(node).__name__, [(name, value) for name, value in fields if value not in (None, [])]
    return [_plain(item) for item in node] if isinstance(node, list) else node
