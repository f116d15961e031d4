"""Tries `evakernels.accelerate` with the last releases of the libraries that it serves, and writes a page of tables.

    python tools/dropin_releases.py [--last 10] [--folder build/releases] [--write docs/dropin-releases.md] [--forms]

Each release is installed without what it requires into a folder of its own, in front of the environment's packages;
`tools/dropin_models.py` then builds small models with it. `--forms` first adds the forms that the releases have to
`evakernels/dropin/forms.json`: look at what changed in them before, and at the table after.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from evakernels.dropin.__main__ import main as add_forms

PACKAGES = {"timm": "timm", "open_clip": "open_clip_torch", "transformers": "transformers"}
MODELS = Path(__file__).with_name("dropin_models.py")
BOUND = 1e-5

Row = dict[str, Any]
Pair = tuple[list[Row], list[Row]]
"""The models' rows with the library's forms known, and by behaviour."""


def releases(package: str, last: int) -> list[str]:
    """The newest versions that the package index has, the newest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    listed = re.search(r"Available versions: (.+)", answer)
    if listed is None:
        raise SystemExit(f"error: pip names no versions of {package}")
    return listed[1].split(", ")[:last]


def install(package: str, version: str, folder: Path) -> Path:
    target = folder / f"{package}-{version}"
    if not target.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target"]
        subprocess.run([*command, target, f"{package}=={version}"], check=True)
    return target


def rows(library: str, target: Path | None, *options: str) -> list[Row]:
    """What each model showed, in a process of its own; one row with an `error` if the library can't be imported."""
    paths = [str(target)] if target is not None else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, str(MODELS.parents[1])]),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, str(MODELS), library, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0:
        found.append({"model": library, "error": (done.stderr.strip() or "no message").splitlines()[-1]})
    return found


def both(library: str, target: Path | None, *options: str) -> Pair:
    """The rows of `rows` with forms and without."""
    with ThreadPoolExecutor() as pool:
        found, tried = pool.map(lambda more: rows(library, target, *options, *more), ((), ("--by-behaviour",)))
    return found, tried


def _is_equal(row: Row) -> bool:
    return "error" not in row and max(row["forward"], row["gradients"]) <= BOUND


def _blocks(found: list[Row]) -> str:
    """How many blocks of how many are replaced, in all models."""
    counted = [re.findall(r"(\d+) of (\d+)", row["headline"])[0] for row in found if "error" not in row]
    return f"{sum(int(done) for done, _ in counted)} of {sum(int(there) for _, there in counted)}"


def release_line(name: str, found: list[Row], tried: list[Row]) -> str:
    """A release's line: what its models have in common, with its forms known and with none, and which differ."""
    ran = [row for row in found if "error" not in row]
    worst = [f"{max((row[part] for row in ran), default=0):.0e}" for part in ("forward", "gradients")]
    notes = [f"{row['model']}: {row['error']}" for row in found if "error" in row]
    notes += [f"{row['model']}: differs" for row in ran if not _is_equal(row)]
    notes += [f"{row['model']}: {row['headline']}" for row in ran if "unknown" in row["headline"]]
    notes += [f"{row['model']}, tried: {row.get('error', 'differs')}" for row in tried if not _is_equal(row)]
    equal = f"{sum(map(_is_equal, found))} of {len(found)}"
    return _line(name, equal, _blocks(found), *worst, _blocks(tried), "; ".join(notes))


def model_line(library: str, row: Row, tried: Row) -> str:
    """A model's line: what of it runs on the ops, with its forms known and with none, and why the rest doesn't."""
    if "error" in row:
        return _line(f"{library}: {row['model']}", "", "", "", "", "", row["error"])
    replaced = ", ".join(f"{count} {name}" for name, count in row["replaced"].items())
    left = "; ".join(f"{count} {why}" for why, count in row["left"].items())
    return _line(
        f"{library}: {row['model']}",
        row["headline"],
        replaced,
        f"{row['forward']:.0e}",
        f"{row['gradients']:.0e}",
        tried.get("headline", tried.get("error", "")).partition(":")[0],
        left,
    )


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def page(by_release: dict[str, Pair], by_library: dict[str, Pair]) -> str:
    """The page, in Markdown."""
    versions = f"torch {torch.__version__.partition('+')[0]}, Python {sys.version_info.major}.{sys.version_info.minor}"
    models = [
        model_line(library, row, next((other for other in tried if other["model"] == row["model"]), {}))
        for library, (found, tried) in by_library.items()
        for row in found
    ]
    return "\n".join(
        [
            "# Drop-in, release by release",
            "",
            f"Made by `tools/dropin_releases.py`, {datetime.date.today()}: {versions}, float32 on a CPU. Models are",
            "narrow and two blocks deep, with random weights. Each is accelerated with `force=True` and compared with",
            "itself untouched, in evaluation and in training: the largest difference of outputs and of gradients, of",
            f"their largest value. Equal is what differs by {BOUND:.0e} at most.",
            "",
            "*By behaviour* is the same once more with no form of any library known, as of a release that is yet to",
            'come, and `unknown="verify"`: what is replaced then was tried and found to behave like the library\'s own',
            "code, or asks a public interface of its library. Those models must be equal as well.",
            "",
            "## Releases",
            "",
            "Blocks count as replaced if they or their attention were, and nothing in them is of an unknown form; of a",
            "loss, the loss itself is counted.",
            "",
            _line(
                "release", "models that are equal", "blocks replaced", "outputs", "gradients", "by behaviour", "not so"
            ),
            "|" + "---|" * 7,
            *(release_line(name, *pair) for name, pair in by_release.items()),
            "",
            "## Models",
            "",
            "Of the environment's releases: every model of timm's class `Eva`, every DINOv2 of timm's, and one of each",
            "kind of the others. What is left keeps its own code.",
            "",
            _line("model", "replaced", "modules", "outputs", "gradients", "by behaviour", "left, and why"),
            "|" + "---|" * 7,
            *models,
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="try evakernels.accelerate with the last releases of other libraries")
    parser.add_argument("--last", type=int, default=10, help="how many releases of each library")
    parser.add_argument("--folder", type=Path, default=Path("build/releases"), help="where they are installed")
    parser.add_argument("--write", type=Path, default=Path("docs/dropin-releases.md"))
    parser.add_argument("--forms", action="store_true", help="first add the releases' forms to forms.json")
    options = parser.parse_args(arguments)
    folders = {
        (library, version): install(package, version, options.folder)
        for library, package in PACKAGES.items()
        for version in releases(package, options.last)
    }
    if options.forms:
        add_forms([str(folder) for folder in folders.values()])
    by_release = {}
    for (library, version), folder in folders.items():
        by_release[f"{library} {version}"] = pair = both(library, folder)
        print(release_line(f"{library} {version}", *pair), flush=True)
    by_library = {library: both(library, None, "--all") for library in (*PACKAGES, "torchvision")}
    options.write.write_text(page(by_release, by_library))


if __name__ == "__main__":
    main()
