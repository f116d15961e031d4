"""`examples/life_cycle/life_cycle.py`: every stage starts from the one before, and the table has all comparisons."""

import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from evaclip.demo import emoji

SCRIPT = Path(__file__).parents[2] / "examples" / "life_cycle" / "life_cycle.py"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_chain_runs_and_is_not_run_twice(tmp_path, monkeypatch, capsys):
    """On 160 of the concepts, with narrow towers: all else is the example's own."""
    concepts = emoji.load_concepts()[:160]
    monkeypatch.setattr(emoji, "load_concepts", lambda skin_tones=False: concepts)
    told = subprocess.run([sys.executable, SCRIPT, "--help"], check=True, capture_output=True, text=True).stdout
    assert "--seeds" in told
    spec = spec_from_file_location("life_cycle", SCRIPT)
    script = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    script.TOWER |= {"width": 64, "heads": 2}
    script.BATCH, script.LARGE_BATCH = 32, 128
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--seeds", "0", "--steps", "10"])
    script.main()
    first = capsys.readouterr().out
    script.main()
    again = capsys.readouterr().out
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
