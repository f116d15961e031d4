"""Pictures to a store by the workers of a Ray cluster of this machine: what the local engine makes, whoever dies."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.torch import save_file

from evaclip.commands.main import main
from evaclip.errors import UserError
from evaclip.runtime import indexing
from evaclip.runtime.ray_engine import Cluster, _shared_out
from evaclip.runtime.store import Store

COUNT, BROKEN = 400, 123
"""Pictures, and the one of them that can't be read."""


@pytest.fixture
def arguments(loaded, tmp_path, monkeypatch):
    """Of `index`, but for the store."""
    draw, root = np.random.default_rng(0), tmp_path / "pictures"
    root.mkdir()
    for number in range(COUNT):
        Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(root / f"{number:03}.png")
    (root / f"{BROKEN:03}.png").write_bytes(b"no picture")
    save_file(loaded.model.state_dict(), tmp_path / "tiny.safetensors")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(part for part in sys.path if part))
    compute = ["--precision", "fp32", "--batch-size", "4", "--thumbnails", "16"]
    return ["--images", str(root), "--model", f"tiny:{tmp_path / 'tiny.safetensors'}", *compute]


def _contents(folder):
    """Rows in the order of their ids, and their embeddings."""
    with Store.open(folder) as store:
        numbers = store.alive().nonzero()[0]
        rows, embeddings = store.rows(numbers), store.embeddings[numbers]
    order = sorted(range(len(rows)), key=lambda number: rows[number].id)
    return [rows[number] for number in order], embeddings[order].astype(np.float32)


def _kill_workers(store, told):
    """Waits until a part of the work is done, which it tells, and kills all that do it."""
    while not Store.exists(store) or not len(Store.open(store)):
        time.sleep(0.02)
    workers = [child for child in psutil.Process().children(recursive=True) if "MapWorker" in child.name()]
    for worker in workers:
        worker.kill()
    told += [len(workers), len(Store.open(store))]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_ray_killed_workers_lose_no_image(arguments, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray", reason="the extra ray isn't installed")
    monkeypatch.setattr(indexing, "_ROWS", 8)
    ray, told = tmp_path / "ray.store", []
    threading.Thread(target=_kill_workers, args=(ray, told), daemon=True).start()
    on_ray = [*arguments, "--engine", "ray", "--workers", "2"]
    assert main(["index", str(ray), *on_ray]) == 0
    assert told[0] == 2
    assert 0 < told[1] < COUNT - 1
    assert f"{COUNT - 1} embedded, 0 unchanged, 1 unreadable" in capsys.readouterr().out
    assert main(["index", str(tmp_path / "local.store"), *arguments]) == 0
    (rows, embeddings), (expected_rows, expected) = _contents(ray), _contents(tmp_path / "local.store")
    assert rows == expected_rows
    np.testing.assert_allclose(embeddings, expected, atol=1e-3)
    listed = [json.loads(line) for line in (ray / indexing.UNREADABLE_FILE.format(0)).read_text().splitlines()]
    assert [(fault["what"], Path(fault["name"]).stem) for fault in listed] == [("corrupt image", f"{BROKEN:03}")]
    capsys.readouterr()
    assert main(["index", str(ray), *on_ray]) == 0
    assert f"0 embedded, {COUNT - 1} unchanged, 1 unreadable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("nodes", "asked", "given"),
    [
        ([{"CPU": 2}], ("auto", None), Cluster(1, "cpu", 2)),
        ([{"CPU": 8}, {"CPU": 4}, {"CPU": 0}], ("auto", None), Cluster(2, "cpu", 4)),
        ([{"CPU": 8}, {"CPU": 4}], ("auto", 3), Cluster(3, "cpu", 2)),
        ([{"CPU": 0, "GPU": 1}, {"CPU": 64, "GPU": 8}, {"CPU": 32, "GPU": 8}], ("auto", None), Cluster(16, "cuda", 4)),
        ([{"CPU": 64, "GPU": 8}], ("auto", 2), Cluster(2, "cuda", 8)),
        ([{"CPU": 64, "GPU": 8}], ("cpu", None), Cluster(1, "cpu", 64)),
    ],
    ids=str,
)
def test_ray_workers_share_nodes(nodes, asked, given):
    assert _shared_out(nodes, *asked) == given
    with pytest.raises(UserError, match="no node of the cluster has a GPU"):
        _shared_out([{"CPU": 8}, {"CPU": 0}], "cuda", 2)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--engine", "ray", "--device", "cuda:1"],
            "device must be auto, cuda or cpu with Ray (one GPU per worker), got 'cuda:1'",
        ),
        (["--workers", "2"], "--workers is for --engine ray"),
        (["--engine", "ray", "--part", "0/2"], "without --part"),
    ],
)
def test_ray_mistakes_leave_no_store(more, says, arguments, tmp_path, capsys):
    if "ray" in more:
        pytest.importorskip("ray", reason="the extra ray isn't installed")
    assert main(["index", str(tmp_path / "a.store"), *arguments, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "a.store").exists()
