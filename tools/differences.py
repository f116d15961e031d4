"""Print which installed packages differ from constraints.txt.

    .venv-newest/bin/python tools/differences.py

A line names a package, its version in the file and the installed one: `timm 1.0.30 -> 1.0.31`.
"""

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def main() -> None:
    installed = {canonicalize_name(found.metadata["Name"]): found.version for found in metadata.distributions()}
    lines = (line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#"))
    for locked in map(Requirement, lines):
        version = installed.get(locked.name)
        applies = locked.marker is None or locked.marker.evaluate()
        if version and applies and not locked.specifier.contains(version, prereleases=True):
            print(f"{locked.name} {str(locked.specifier).removeprefix('==')} -> {version}")


if __name__ == "__main__":
    main()
