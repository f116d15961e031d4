"""What many processes and shards cost by names alone is measured on what the library itself reads and writes."""

from pathlib import Path

import pytest

from benchmarks.cli import main
from benchmarks.metadata import measure_checkpoint


@pytest.mark.parametrize("ranks", [1, 4])
def test_opens_are_counted(ranks: int, tmp_path: Path) -> None:
    opens = {cost.what.split(":")[0]: cost.opens for cost in measure_checkpoint(ranks, tmp_path)}
    # The index, and the file, made for its mode; it is written by code that isn't Python's.
    assert opens["save"] == 2
    assert opens["join"] == ranks + 2
    assert opens["resume"] == 3


def test_a_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metadata", "--ranks", "2", "--shards", "50"]) == 0
    text = capsys.readouterr().out
    assert "2 processes, join" in text
    assert "a list of 50 shards, 500,000 samples: open" in text
