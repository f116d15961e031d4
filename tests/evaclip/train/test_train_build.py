"""What is said of the data before a run begins."""

from pathlib import Path

import pytest

from evaclip.commands.main import main
from evaclip.data import open_configured
from evaclip.data.config import DataConfig
from evaclip.data.shard_writer import write_shard
from evaclip.train import build


def test_many_shards_without_a_list_cost_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "MANY_SHARDS", 2)
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", [("a", {"png": b"no picture", "txt": b"text"})])
    pattern, listed = str(tmp_path / "{0..2}.tar"), str(tmp_path / "shards.json")
    assert main(["data", "index", pattern, "--out", listed]) == 0

    def told(processes: int, **options: object) -> list[str]:
        data = DataConfig(**options)  # type: ignore[arg-type]
        return build.unlisted(data, open_configured(data), processes)

    (line,) = told(8, train=pattern)
    assert line.startswith(f"each of 8 processes has looked at all 3 shards of {pattern}; ")
    assert line.endswith(f"evaclip data index '{pattern}' --out shards.json")
    assert told(8, train=listed) == told(1, train=pattern) == told(8, train=str(tmp_path / "{0..1}.tar")) == []
    mixture = {name: {"train": path, "weight": 1} for name, path in (("a", pattern), ("b", listed))}
    assert told(8, train="", mixture=mixture) == [line]
