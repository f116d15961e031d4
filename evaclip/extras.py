"""The packages that the distribution asks for, by extra, and the error where one of them is missing."""

import re
from importlib import import_module
from typing import Any

from evaclip.errors import UserError

DISTRIBUTION = "evakernels"

_FOR_DEVELOPERS = ("bench", "docs", "test", "test-all")
_REQUIREMENT = re.compile(r"""^(?P<name>[\w.-]+)[^;]*(;.*extra\s*==\s*["'](?P<extra>[\w-]+)["'])?""")
# Under what other name a package is imported can't be looked up where it is missing.
_IMPORTED_AS = {
    "faiss-cpu": "faiss",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}


def requirements() -> dict[str, list[str]]:
    """Names of the required packages by extra, "" for the core, as the installed distribution declares them.

    Extras that serve work on the project itself are left out.
    """
    from importlib import metadata  # 30 ms, which only those wait for who ask

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


def with_remedy(exc: Exception) -> Exception:
    """The error with what to install, where it says that a package of an extra is missing; else as it is."""
    if isinstance(exc, ModuleNotFoundError):
        for extra, packages in requirements().items():
            for package in packages:
                if exc.name == _IMPORTED_AS.get(package, package.replace("-", "_")):
                    return UserError(f"the package {package} is not installed: {install_command(extra)}")
    return exc
