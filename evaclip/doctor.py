"""`evaclip doctor`: what is installed, which backends are live, and why others are not."""

import argparse
import re
from importlib import metadata
from typing import Any

from evaclip.cli import leaf

_DISTRIBUTION = "evakernels"
_EXTRAS = ("", "clip", "demo", "export")
_REQUIREMENT = re.compile(r"""^(?P<name>[\w.-]+)[^;]*(;.*extra\s*==\s*["'](?P<extra>\w+)["'])?""")

Row = tuple[str, ...]


def add_commands(subparsers: Any) -> None:
    """Adds `doctor` to the command line."""
    help = "show what is installed, which backends are live, and why others are not"
    leaf(subparsers, "doctor", help=help, examples=["evaclip doctor"]).set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints one table for the system, one for the packages and one for the ops."""
    from rich.console import Console

    from evakernels import info

    console = Console()
    console.print(_table("System", ("what", "state"), system_rows(info())))
    console.print(_table("Packages", ("package", "version", "for"), package_rows()))
    console.print(_table("Ops", ("op", "live", "why not the others"), backend_rows()))


def system_rows(facts: dict[str, Any]) -> list[Row]:
    """Interpreter, torch, the native library and the GPUs; `facts` is what `evakernels.info()` returns."""
    native, cuda = facts["native"], facts["cuda"]
    return [
        ("evakernels", str(facts["evakernels"])),
        ("Python", str(facts["python"])),
        ("torch", str(facts["torch"])),
        ("triton", facts["triton"] or "not installed: needed for kernels on GPUs only"),
        ("native library", _native_state(native)),
        ("instruction sets", _instruction_sets(native)),
        ("CUDA", _cuda_state(cuda)),
    ]


def package_rows() -> list[Row]:
    """Each package that the distribution asks for: its version, or how to install it."""
    rows: list[Row] = []
    for extra, names in _requirements().items():
        remedy = f"not installed: pip install '{_DISTRIBUTION}[{extra}]'" if extra else "not installed"
        rows += [(name, _version(name) or remedy, extra or "core") for name in names]
    return rows


def backend_rows() -> list[Row]:
    """Each op: the backend that is live, and why each other one is not."""
    from evakernels.backends import explain, ops

    rows: list[Row] = []
    for op in ops():
        live, others = "none", []
        for line in explain(op).splitlines():
            backend, _, verdict = line.partition(" on ")[2].partition(": ")
            if verdict == "serves the call":
                live = backend
            else:
                others.append(f"{backend}: {verdict.removeprefix(op).strip()}")
        rows.append((op, live, "; ".join(others)))
    return rows


def _native_state(native: dict[str, Any]) -> str:
    if native["loaded"]:
        return f"loaded, built by {native.get('compiler', 'an unknown compiler')}"
    return f"not loaded: {native['reason']}; all ops run on the reference implementation"


def _instruction_sets(native: dict[str, Any]) -> str:
    if native["isa_error"]:
        return str(native["isa_error"])
    if native["isa"] is None:
        return "none: there is no native library"
    return f"{native['isa']} in use; built: {', '.join(native['isas_built'])}"


def _cuda_state(cuda: dict[str, Any]) -> str:
    if cuda["available"]:
        return ", ".join(cuda["devices"])
    if cuda["version"] is None:
        return "none: this torch is built without CUDA"
    return f"none: torch is built for CUDA {cuda['version']}, but there is no usable GPU or driver"


def _requirements() -> dict[str, list[str]]:
    """Names of the required packages by extra, as the installed distribution declares them."""
    found: dict[str, list[str]] = {extra: [] for extra in _EXTRAS}
    try:
        declared = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        declared = []
    for requirement in declared:
        match = _REQUIREMENT.match(requirement)
        if match and match["name"] != _DISTRIBUTION and (match["extra"] or "") in found:
            found[match["extra"] or ""].append(match["name"])
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _table(title: str, columns: Row, rows: list[Row]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
