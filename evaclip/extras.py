"""Required packages by extra, and the error if one is missing."""

import re
from importlib import import_module
from typing import Any

from evaclip.errors import UserError

DISTRIBUTION = "evakernels"

_FOR_DEVELOPERS = ("bench", "docs", "test", "test-all")
_REQUIREMENT = re.compile(r"""^(?P<name>[\w.-]+)[^;]*(;.*extra\s*==\s*["'](?P<extra>[\w-]+)["'])?""")
_IMPORTED_AS = {"faiss-cpu": "faiss", "pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
"""Modules of packages with another name; a missing package has no metadata."""


def requirements() -> dict[str, list[str]]:
    """Names of the required packages by extra, "" for the core, as the installed distribution declares them.

    Extras for developers are left out.
    """
    from importlib import metadata  # takes 30 ms

    found: dict[str, list[str]] = {"": []}
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        declared = []
    for requirement in declared:
        match = _REQUIREMENT.match(requirement)
        if match and match["name"] != DISTRIBUTION and match["extra"] not in _FOR_DEVELOPERS:
            found.setdefault(match["extra"] or "", []).append(match["name"])
    return found


def install_command(extra: str) -> str:
    """Command that installs the packages of an extra, or of the core for ""."""
    return f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install {DISTRIBUTION}"


def import_extra(module: str) -> Any:
    """Import a module of an extra.

    Raises:
        UserError: its package is missing; the message has the command that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as exc:
        raise with_remedy(exc) from exc


def with_remedy(exc: Exception, extra: str = "") -> Exception:
    """Return a `UserError` with the install command if a package of an extra is missing, otherwise `exc`.

    `extra` is named if it has the package, otherwise the first extra that has it.
    """
    if isinstance(exc, ModuleNotFoundError):
        packages = requirements()
        for name in (extra, *packages):
            for package in packages.get(name, ()):
                if exc.name == _IMPORTED_AS.get(package, package.replace("-", "_")):
                    return UserError(f"the package {package} is not installed: {install_command(name)}")
    return exc
