from pathlib import Path

import pytest
from data_samples import sample
from shard_server import ShardServer

from evaclip.data.shard_writer import write_shard


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> Path:
    """Keeps the index cache of the tests out of the user's home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "evaclip" / "tar-index"


@pytest.fixture
def shards(tmp_path) -> str:
    """The pattern of three sound shards with 20, 30 and 14 samples, numbered 0 to 63."""
    start = 0
    for shard, size in enumerate((20, 30, 14)):
        write_shard(tmp_path / f"{shard:02d}.tar", map(sample, range(start, start + size)))
        start += size
    return str(tmp_path / "{00..02}.tar")


@pytest.fixture
def server(shards, tmp_path):
    with ShardServer(tmp_path).running() as running:
        yield running
