"""Packages of AOTInductor, in processes that have imported this library and in ones that have not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evakernels

pytestmark = [pytest.mark.exhaustive, pytest.mark.slow, pytest.mark.xdist_group("packages")]

LOAD = """
import sys, torch
package, numbers, library = sys.argv[1:]
if library == "import":
    import evakernels
elif library:
    torch.ops.load_library(library)
x, expected = torch.load(numbers)
torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), expected)
assert ("evakernels" in sys.modules) == (library == "import")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that calls our op, one of torch's operators, and an input with its output."""
    folder = tmp_path_factory.mktemp("packages")
    norm, x = evakernels.nn.LayerNorm(8).eval(), torch.linspace(-1, 1, 16).view(2, 8)
    with torch.no_grad():
        ours = torch.export.export(norm, (x,))
        with evakernels.as_torch_operators():
            torchs = torch.export.export(norm, (x,))
        torch.save((x, norm(x)), folder / "numbers.pt")
    for name, program in (("ours", ours), ("torchs", torchs)):
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / f"{name}.pt2"))
    return folder


def run(folder: Path, name: str, library: str) -> str:
    command = [sys.executable, "-c", LOAD, str(folder / f"{name}.pt2"), str(folder / "numbers.pt"), library]
    return subprocess.run(command, capture_output=True, text=True).stderr.rstrip().rpartition("\n")[2]


def test_aoti_package_runs_after_import(folder: Path) -> None:
    assert "Error" not in run(folder, "ours", "import")


def test_a_package_of_torchs_operators_runs_anywhere(folder: Path) -> None:
    assert "Error" not in run(folder, "torchs", "")
