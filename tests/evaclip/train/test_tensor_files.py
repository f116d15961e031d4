"""What each process writes of a checkpoint is joined in one pass, however slow the disk is."""

import json
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from processes import in_processes
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from evaclip.train import checkpoint, tensor_files
from evaclip.train.checkpoint import Content
from evaclip.train.config import CheckpointConfig, ParallelConfig
from evaclip.train.distributed import connect
from evaclip.train.saver import Saver

WHOLE = {
    "scale": torch.tensor(2.5),
    "rows": torch.arange(35.0).reshape(7, 5),
    "columns": torch.arange(42).reshape(2, 7, 3).to(torch.bfloat16),
    "short": torch.ones(1, 2, dtype=torch.float64),
}
CUT_AT = {"rows": 0, "columns": 1, "short": 0}


def write_parts(tensors: dict[str, Tensor], folder: Path, ranks: int) -> None:
    """As torch's writer does: what isn't cut is in one file, and some have empty parts of what is."""
    folder.mkdir()
    for rank in range(ranks):
        parts, places = {}, {}
        for name, whole in tensors.items():
            if name in CUT_AT:
                dim = CUT_AT[name]
                step = -(-whole.shape[dim] // ranks)
                begin = min(rank * step, whole.shape[dim])
                parts[name] = whole.narrow(dim, begin, min(step, whole.shape[dim] - begin)).contiguous()
                places[name] = {"saved_offsets": [begin if at == dim else 0 for at in range(whole.ndim)]}
            elif rank == ranks - 1:
                parts[name], places[name] = whole, {"saved_offsets": [0] * whole.ndim}
        about = {"DCP_SHARDING_INFO": json.dumps(places), "format": "pt"}
        save_file(parts, folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", metadata=about)


def assert_equal(path: Path) -> None:
    found = load_file(path)
    assert found.keys() == WHOLE.keys()
    for name, value in WHOLE.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("ranks", [1, 2, 4, 9])
def test_parts_are_joined_in_one_pass(ranks: int, tmp_path: Path) -> None:
    opened: list[Path] = []
    read: list[str] = []

    class Counted:
        def __init__(self, path: Path, framework: str) -> None:
            opened.append(path)
            self._file = safe_open(path, framework)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exc: object) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self._file.get_tensor(name)

    write_parts(WHOLE, tmp_path / "parts", ranks)
    with patch.object(tensor_files, "safe_open", Counted), patch("safetensors.safe_open", Counted):
        tensor_files.join(tmp_path / "parts", tmp_path / "joined.safetensors", WHOLE)
    assert_equal(tmp_path / "joined.safetensors")
    assert opened == sorted((tmp_path / "parts").iterdir())
    assert len(read) == ranks * len(CUT_AT) + 1


def test_the_file_is_the_same_from_any_number_of_processes(tmp_path: Path) -> None:
    files = []
    for ranks in (1, 3, 8):
        write_parts(WHOLE, tmp_path / f"{ranks}", ranks)
        files.append(tmp_path / f"{ranks}.safetensors")
        tensor_files.join(tmp_path / f"{ranks}", files[-1], WHOLE)
    assert all(one.read_bytes() == other.read_bytes() for one, other in pairwise(files))


def test_what_is_incomplete_is_not_joined(tmp_path: Path) -> None:
    """A file of another machine may not be seen yet; torch's reader would leave memory as it was in its place."""
    write_parts(WHOLE, tmp_path / "parts", 3)
    with pytest.raises(OSError, match="has parts of rows as"):
        tensor_files.join(
            tmp_path / "parts", tmp_path / "joined.safetensors", {**WHOLE, "rows": torch.ones(7, 5).half()}
        )
    sorted((tmp_path / "parts").iterdir())[1].unlink()
    with pytest.raises(OSError, match="don't make up 2 of 4 tensors, such as rows"):
        tensor_files.join(tmp_path / "parts", tmp_path / "joined.safetensors", WHOLE)


def content() -> Content:
    mesh = init_device_mesh("cpu", (2,))
    model = {
        name: distribute_tensor(value, mesh, [Shard(CUT_AT[name])]) if name in CUT_AT else value
        for name, value in WHOLE.items()
    }
    return Content(model=model, ema=model, moments={"rows.m": model["rows"]}, descriptions={}, state={}, meta={})


def save_slowly(root: Path) -> None:
    """The main process begins the first checkpoint when the other one has given up waiting for it."""
    given_up = root.with_name("given-up")

    def wait() -> None:
        while not given_up.exists():
            time.sleep(0.1)

    with closing(connect("cpu", ParallelConfig(saving_timeout_minutes=1 / 20))) as world:
        said: list[str] = []
        with closing(Saver(root, CheckpointConfig(), world, said.append, wait)) as saver:
            for step in (1, 2):
                saver.start(step, content())
                saver.finish()
                if not world.is_main:
                    given_up.touch()
    (line,) = said
    assert "the processes lost each other" in line
    assert "the run goes on, no earlier one is there" in line


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_a_slow_disk_ends_neither_run_nor_saving(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    in_processes(2, save_slowly, root)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000002"]
    checkpoint.read_meta(root / "step_00000002")
    assert_equal(root / "step_00000002" / "model.safetensors")
    assert_equal(root / "step_00000002" / "ema.safetensors")
