"""Which evakernels is measured, and how a run says so."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import evakernels
from benchmarks import cli, origin
from benchmarks import machine as machines
from evakernels import _native


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout, another folder where evakernels is installed, and Python before it has imported either."""
    for folder in ("checkout", "installed"):
        (tmp_path / folder / "evakernels").mkdir(parents=True)
        (tmp_path / folder / "evakernels" / "__init__.py").touch()
    monkeypatch.setattr(origin, "ROOT", tmp_path / "checkout")
    monkeypatch.delitem(sys.modules, "evakernels")
    return tmp_path / "checkout"


def chosen(monkeypatch: pytest.MonkeyPatch, *arguments: str, path: Sequence[Path]) -> list[str]:
    """Where Python looks after the choice; the first folder is the current one, which it calls by an empty name."""
    monkeypatch.chdir(path[0])
    monkeypatch.setattr(sys, "path", ["", *map(str, path)])
    monkeypatch.setattr(sys, "argv", ["-m", *arguments])
    origin.choose()
    return sys.path


def test_a_compiled_checkout_is_measured_unless_the_installed_one_is_asked_for(checkout, monkeypatch):
    installed = checkout.parent / "installed"
    (checkout / "evakernels" / "_ops.so").touch()
    assert chosen(monkeypatch, "all", path=[checkout, installed]) == ["", str(checkout), str(installed)]
    assert chosen(monkeypatch, "all", "--installed", path=[checkout, installed]) == [str(installed)]


def test_of_a_checkout_that_is_not_compiled_the_installed_one_is_measured(checkout, monkeypatch):
    installed = checkout.parent / "installed"
    assert chosen(monkeypatch, "all", path=[checkout, installed]) == [str(installed)]
    assert chosen(monkeypatch, "all", path=[checkout]) == ["", str(checkout)]


def test_a_run_says_what_it_measured(monkeypatch, steady):
    there = machines.describe(torch.device("cpu"), (), ())
    assert there.package == (
        f"evakernels/__init__.py of this checkout, {evakernels.__version__}, compiled, {_native.active_isa()}"
    )
    assert there.versions["evakernels"] == evakernels.__version__
    assert there.notes == []
    monkeypatch.setattr(origin, "ROOT", Path("/elsewhere"))
    assert machines.describe(torch.device("cpu"), (), ()).package.startswith(f"{evakernels.__file__}, ")


def test_without_the_compiled_library_a_run_says_so_loudly(monkeypatch, capsys, steady):
    monkeypatch.setattr(_native, "LOADED", False)
    monkeypatch.setattr(_native, "REASON", "not built: nobody did")
    told = "NO COMPILED LIBRARY (not built: nobody did): evakernels is measured on its references"
    there = machines.describe(torch.device("cpu"), (), ())
    assert there.package.endswith(", not compiled")
    assert there.notes[0].startswith(told)
    assert cli.main(["list"]) == 0
    assert f"warning: {told}" in capsys.readouterr().err
