"""Print the requirements of extras in pyproject.toml, one a line.

    pip install $(python tools/requirements.py demo)

This installs the packages of an extra without building the project.
"""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
OWN_EXTRAS = re.compile(rf"{PROJECT['name']}\[(?P<names>[^\]]+)\]")


def requirements(extra: str) -> set[str]:
    """Return the requirements of an extra, and of the extras of this project that it names."""
    found: set[str] = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        own = OWN_EXTRAS.fullmatch(requirement)
        found |= set().union(*map(requirements, own["names"].split(","))) if own else {requirement}
    return found


if __name__ == "__main__":
    print(*sorted(set().union(*map(requirements, sys.argv[1:]))), sep="\n")
