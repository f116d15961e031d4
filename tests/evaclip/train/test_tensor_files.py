"""Each process writes its part and reads its part; who needs whole weights has them joined, once."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from evaclip.errors import UserError
from evaclip.train import checkpoint
from evaclip.train.checkpoint import Content, DamagedCheckpoint
from evaclip.train.config import CheckpointConfig, ParallelConfig
from evaclip.train.distributed import connect
from evaclip.train.saver import Saver
from evaclip.weights import load_state_dict, shard_like, shards

WHOLE = {
    "scale": torch.tensor(2.5),
    "rows": torch.arange(35.0).reshape(7, 5),
    "more": torch.arange(42).reshape(14, 3).to(torch.bfloat16),
    "short": torch.ones(1, 2, dtype=torch.float64),
}
CUT = ("rows", "more", "short")


@contextmanager
def as_process(rank: int, shape: tuple[int, ...]) -> Iterator[Any]:
    """Gives the mesh of one of several processes, the others of which aren't there; the last dimension is cut over."""
    size = torch.Size(shape).numel()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield init_device_mesh("cpu", shape)
    finally:
        dist.destroy_process_group()


def held(mesh: Any) -> dict[str, Tensor]:
    """What a process holds of `WHOLE`."""
    how = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    empty = {name: DTensor.from_local(torch.empty(0), mesh, how, run_check=False, shape=WHOLE[name].shape,
             stride=WHOLE[name].stride()) for name in CUT}  # fmt: skip
    return {name: shard_like(value, empty[name]) if name in CUT else value for name, value in WHOLE.items()}


def write(folder: Path, *shape: int) -> None:
    """As all processes of a mesh do."""
    size = torch.Size(shape).numel()
    for rank in range(size):
        with as_process(rank, shape) as mesh:
            checkpoint.write_shards(held(mesh), folder, rank, size)


@contextmanager
def counting_opens() -> Iterator[list[str]]:
    """Gives the names of the files of parts that are opened, and of their indexes."""
    opened: list[str] = []
    original = Path.open

    def counted(self: Path, *args: Any, **options: Any) -> Any:
        opened.append(self.name)
        return original(self, *args, **options)

    with patch.object(Path, "open", counted):
        yield opened


def assert_equal(path: Path) -> None:
    found = load_file(path)
    assert found.keys() == WHOLE.keys()
    for name, value in WHOLE.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def names(*numbers: int) -> list[str]:
    return [f"{number:05d}.safetensors" for number in numbers]


@pytest.mark.parametrize("ranks", [1, 2, 9])
def test_parts_are_joined_in_one_pass(ranks: int, tmp_path: Path) -> None:
    write(tmp_path / "parts", ranks)
    with counting_opens() as opened:
        shards.join(tmp_path / "parts", tmp_path / "joined.safetensors")
    assert_equal(tmp_path / "joined.safetensors")
    assert sorted(opened) == sorted([*names(*range(ranks)), "index.json", "joined.safetensors"])


def test_what_is_incomplete_is_neither_joined_nor_read(tmp_path: Path) -> None:
    """A file of another machine may not be seen yet."""
    write(tmp_path / "parts", 3)
    save_file({}, tmp_path / "parts" / names(1)[0])
    for use in (
        lambda: shards.join(tmp_path / "parts", tmp_path / "joined.safetensors"),
        lambda: shards.read({name: torch.zeros_like(value) for name, value in WHOLE.items()}, tmp_path / "parts"),
    ):
        with pytest.raises(OSError, match="don't make up 2 of 4 tensors, such as "):
            use()


@pytest.mark.parametrize(
    ("rank", "shape", "files"),
    [
        (3, (8,), [0, 3]),  # the same number: its own, and the first one's, which has what isn't cut
        (1, (2,), [0, 3, 4, 5, 6]),  # the eighth has no rows, of 7 in steps of 1 as of 14 in steps of 2
        (0, (1,), [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_a_process_opens_the_files_that_hold_its_rows(rank, shape, files, tmp_path):
    write(tmp_path / "parts", 8)
    with as_process(rank, shape) as mesh, counting_opens() as opened:
        expected = held(mesh)
        targets = {name: torch.zeros_like(value) for name, value in expected.items()}
        assert {name: value.shape for name, value in shards.read_metadata(tmp_path / "parts").items()} == {
            name: value.shape for name, value in WHOLE.items()
        }
        shards.read(targets, tmp_path / "parts")
        for name, value in expected.items():
            here, there = (t.to_local() if isinstance(t, DTensor) else t for t in (value, targets[name]))
            assert torch.equal(here, there), name
    assert sorted(set(opened)) == [*names(*files), "index.json"]
    assert opened.count("index.json") == 2
    assert len(opened) == len(files) + 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    write(tmp_path / "parts", 3)
    targets = {name: torch.zeros_like(value) for name, value in WHOLE.items()}
    load(targets, storage_reader=HuggingFaceStorageReader(str(tmp_path / "parts")), no_dist=True)
    assert all(torch.equal(targets[name], value) for name, value in WHOLE.items())


def test_save_lists_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders have files of all ranks, each of which would list them."""
    written = []
    with monkeypatch.context() as patched:
        for name in ("listdir", "scandir"):
            patched.setattr(os, name, lambda *_: pytest.fail("a folder is listed"))
        for rank in range(3):
            with as_process(rank, (3,)) as mesh:
                tensors, files = held(mesh), {"hf_text/config.json": b"{}"}
                content = Content(tensors, tensors, {"rows.m": tensors["rows"]}, {"model.json": {}}, {}, {}, files)
                written.append(checkpoint._write_rank_files(tmp_path, content, dist.group.WORLD))
        checkpoint._finish_folder(tmp_path, 1, content, written)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert checkpoint.read_meta(tmp_path)["files"].keys() == files - {"meta.json"}
    assert len(files) == 3 * 3 + 3 + 4


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of three processes as far as its weights go."""
    folder = tmp_path / "checkpoints" / "step_00000002"
    for file in ("model.safetensors", "ema.safetensors"):
        write(folder / f"{file}.parts", 3)
    (folder.parent / "latest").write_text("step_00000002\n")
    files = [path for path in folder.rglob("*") if path.is_file()]
    facts = {str(path.relative_to(folder)): shards.fingerprint(path) for path in files}
    (folder / "meta.json").write_text(json.dumps({"format": checkpoint.FORMAT, "step": 2, "files": facts}))
    return folder


def test_who_reads_weights_joins_them_once(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        found = load_state_dict(sharded / "model.safetensors")
        assert torch.equal(found["rows"], WHOLE["rows"])
    assert capsys.readouterr().err.count("joining the shards of") == 1
    assert sorted(path.name for path in sharded.iterdir() if path.is_file()) == ["meta.json", "model.safetensors"]
    checkpoint.read_meta(sharded)


def test_two_readers_at_once_wait_for_one_join(sharded: Path) -> None:
    joins = []

    def slowly(*args: Any) -> None:
        joins.append(args)
        time.sleep(0.2)
        original(*args)

    original = shards.join
    with patch.object(shards, "join", slowly):
        threads = [
            threading.Thread(target=shards.ensure_joined, args=(sharded / "model.safetensors",)) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(joins) == 1
    assert_equal(sharded / "model.safetensors")


@pytest.mark.parametrize("harm", ["truncated", "changed", "missing"])
def test_a_damaged_part_is_noticed(harm: str, sharded: Path) -> None:
    path = sharded / "model.safetensors.parts" / names(1)[0]
    data = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-4] if harm == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    for check in (checkpoint.read_meta, checkpoint.check_weights):
        with pytest.raises(DamagedCheckpoint, match="parts/00001"):
            check(sharded)
    with pytest.raises(UserError, match=r"is damaged: .*model\.safetensors\.parts/00001"):
        shards.ensure_joined(sharded / "model.safetensors")
    assert [path.name for path in sharded.iterdir() if path.is_file()] == ["meta.json"]


def test_damage_to_what_was_joined_is_noticed(sharded: Path) -> None:
    path = shards.ensure_joined(sharded / "model.safetensors")
    assert checkpoint.check_weights(sharded) is None
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedCheckpoint, match=r"contents of model\.safetensors have changed"):
        checkpoint.check_weights(sharded)
    checkpoint.read_meta(sharded)  # the run goes on from the parts


def content() -> Content:
    mesh = init_device_mesh("cpu", (2,))
    model = {
        name: distribute_tensor(value, mesh, [Shard(0)]) if name in CUT else value for name, value in WHOLE.items()
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
        start_folder = checkpoint._start_folder
        checkpoint._start_folder = lambda folder: (wait(), start_folder(folder))
        with Saver(root, CheckpointConfig(), world, said.append) as saver:
            for step in (1, 2):
                saver.start(step, content())
                saver.finish()
                if not world.is_main:
                    given_up.touch()
        check_together(root, world)
    (line,) = said
    assert "the processes lost each other" in line
    assert line.endswith("; no earlier one is there")


def check_together(root: Path, world: Any) -> None:
    """What one process finds damaged, all pass over."""
    files = [root / "step_00000002" / folder / names(1)[0] for folder in ("optimizer", "ema.safetensors.parts")]
    found = []
    for path in (None, *files):
        if world.is_main and path:
            path.rename(path.with_name("away"))
        said: list[str] = []
        choose = partial(checkpoint.choose, root, said.append, lambda meta: True)
        found.append(world.decide(choose, checkpoint.damage_in_share))
        world.any(False)
        if world.is_main and path:
            path.with_name("away").rename(path)
            assert f"{path.parent.name}/00001.safetensors is missing" in said[0]
    assert found == [root / "step_00000002", None, None]


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_a_slow_disk_ends_neither_run_nor_saving(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    in_processes(2, save_slowly, root)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000002"]
    checkpoint.read_meta(root / "step_00000002")
    for file in ("model.safetensors", "ema.safetensors"):
        assert not (root / "step_00000002" / file).exists()
        assert_equal(shards.ensure_joined(root / "step_00000002" / file))
