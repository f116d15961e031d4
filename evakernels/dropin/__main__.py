"""`python -m evakernels.dropin FOLDER...`: adds the forms that the libraries in the folders have to `forms.json`.

A folder is a site-packages or an unpacked sdist or wheel. The forms of another version may only be kept when the tests
pass with it.
"""

import argparse
import ast
import json
import re
from pathlib import Path
from typing import Any

from evakernels.dropin._form import FORMS, fingerprint
from evakernels.dropin._rule import form_names


def add(known: dict[str, dict[str, str]], names: list[str], folder: Path) -> int:
    """Adds the forms of `names` that the sources in `folder` have, a site-packages or an unpacked sdist or wheel.

    Returns:
        How many it has, known before or not.
    """
    count = 0
    for name in names:
        source, version = _source(folder, name), _version(folder, name.partition(".")[0])
        form = None if source is None else fingerprint(source)
        if form is not None and version is not None:
            of_name = known.setdefault(name, {})
            versions = {*of_name.get(form, "").split(), version}
            of_name[form] = " ".join(sorted(versions, key=lambda v: [int(n) for n in re.findall(r"\d+", v)]))
            count += 1
    return count


def _version(folder: Path, library: str) -> str | None:
    found = [
        path
        for path in folder.glob(f"{library}*.dist-info/METADATA")
        if path.parent.name.startswith((f"{library}-", f"{library}_torch-"))
    ]
    found += folder.glob("PKG-INFO")
    lines = found[0].read_text().splitlines() if found else []
    return next((line.removeprefix("Version: ") for line in lines if line.startswith("Version: ")), None)


def _source(folder: Path, name: str) -> str | None:
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        for root in (folder, folder / "src"):
            path = root.joinpath(*parts[:count]).with_suffix(".py")
            if path.exists():
                return _definition(path.read_text(), parts[count:])
    return None


def _definition(text: str, path: list[str]) -> str | None:
    scope: Any = ast.parse(text)
    for name in path:
        scope = next((node for node in scope.body if getattr(node, "name", None) == name), None)
        if scope is None:
            return None
    return ast.unparse(scope)


def main(arguments: list[str] | None = None) -> None:
    """Reads the folders' sources and rewrites `forms.json`, unless one of them has no form."""
    parser = argparse.ArgumentParser(prog="python -m evakernels.dropin", description="Adds known forms of libraries.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a site-packages, or an unpacked sdist or wheel")
    names = form_names()
    known = {name: forms for name, forms in json.loads(FORMS.read_text()).items() if name in names}
    for folder in parser.parse_args(arguments).folders:
        if not add(known, names, Path(folder)):
            parser.error(f"no release of timm, open_clip or transformers is in {folder}, or none with its version")
    FORMS.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
