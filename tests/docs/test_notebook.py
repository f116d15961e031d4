"""`examples/accelerate.ipynb` runs from top to bottom."""

import json

import matplotlib as mpl
import pytest
from run_docs import ROOT

NOTEBOOK = ROOT / "examples/accelerate.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.exhaustive
def test_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    mpl.use("agg")
    names: dict[str, object] = {}
    for cell in code_cells():
        exec(cell.replace("eva02_base_patch16_clip_224", "eva02_tiny_patch14_224"), names)
    out = capsys.readouterr().out
    assert "12 of 12 blocks" in out
    assert "speedup" in out
