"""Errors of missing packages; tests/packaging/test_clean_room.py has an environment without extras."""

import sys

import pytest

from evaclip import extras
from evaclip.commands.main import main
from evaclip.errors import UserError
from evaclip.redact import redacted


@pytest.mark.parametrize(("module", "package", "extra"), [("PIL", "pillow", "clip"), ("s3fs", "s3fs", "remote")])
def test_missing_module_names_package(module: str, package: str, extra: str) -> None:
    error = extras.with_remedy(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert isinstance(error, UserError)
    assert str(error) == f"the package {package} is not installed: pip install 'evakernels[{extra}]'"


def test_command_names_its_own_extra(monkeypatch, capsys) -> None:
    """Though another extra, which comes first, has the package too."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "evaclip.demo.emoji", raising=False)
    monkeypatch.delattr("evaclip.demo.emoji", raising=False)
    assert main(["data", "emoji", "x"]) == 2
    assert capsys.readouterr().err.endswith("pip install 'evakernels[demo]'\n")


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
