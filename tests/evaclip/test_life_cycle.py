"""`examples/life_cycle/life_cycle.py`: every stage starts from the one before, and the table has all comparisons."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "life_cycle" / "life_cycle.py"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_chain_runs_and_is_not_run_twice(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--seeds", "0", "--steps", "10"]
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first, again = (subprocess.run(command, cwd=tmp_path, check=True, **told).stdout for _ in range(2))
    table = first[first.index("| what |") :]
    rows = re.findall(r"^\| (.+) \| (zero-shot top-\d|top-\d) \| (\d+\.\d\d) \| - \|$", table, re.MULTILINE)
    assert len(rows) == 16
    assert again.endswith(table)
    trained = re.compile(r"^step \d+/\d+  loss", re.MULTILINE)
    assert len(trained.findall(first)) >= 8
    assert not trained.search(again)
    starts = [line for line in first.splitlines() if line.startswith("$ evaclip train")]
    assert len(starts) == 11
    assert "pretrained: runs/life/clip-0" in starts[1]
    assert "model.pretrained_image=runs/life/mim-0" in starts[2]
    assert "model.pretrained_image=runs/life/clip-from-mim-0" in starts[-1]
