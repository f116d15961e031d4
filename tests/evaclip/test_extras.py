"""What is said where a package of an extra is missing; tests/packaging/test_clean_room.py has such an environment."""

import pytest

from evaclip import extras
from evaclip.errors import UserError
from evaclip.redact import redacted


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("PIL", "pillow", "clip"),
        ("s3fs", "s3fs", "remote"),
    ],
)
def test_missing_module_names_package(module: str, package: str, extra: str) -> None:
    error = extras.with_remedy(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert isinstance(error, UserError)
    assert str(error) == f"the package {package} is not installed: pip install 'evakernels[{extra}]'"


def test_other_errors_are_unchanged() -> None:
    for error in (ModuleNotFoundError("No module named 'other'", name="other"), ImportError("cannot import name 'x'")):
        assert extras.with_remedy(error) is error


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("pipe:curl -H 'Authorization: Bearer abc' https://h/{0..9}.tar | cat", "pipe:[redacted]"),
        ("a.tar::pipe:aws s3 cp s3://b/c.tar -", "a.tar::pipe:[redacted]"),
        ("https://me:p@ss@host:8080/a.tar", "https://host:8080/a.tar"),
        ("https://h/{00..09}.tar?sig=abc&e=1", "https://h/{00..09}.tar?[redacted]"),
        ("X-Api-Key: abc", "X-Api-Key: [redacted]"),
        ("hf_abcdefghijklmnopqrst", "[redacted]"),
        ("data/?.tar", "data/?.tar"),
    ],
)
def test_redacted_text(given: str, expected: str) -> None:
    assert redacted(given) == expected


def test_redacted_tree() -> None:
    tree = {"headers": {"A": "b"}, "hf_token": "abc", "token_dropout": 0.5, "use_token": True, "list": ["pipe:x", 1]}
    hidden = {"headers": "[redacted]", "hf_token": "[redacted]", "list": ["pipe:[redacted]", 1]}
    assert redacted(tree) == {**tree, **hidden}
