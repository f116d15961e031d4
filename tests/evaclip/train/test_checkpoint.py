"""Checkpoints: all or nothing, checked, thinned out."""

import json
import math
import resource
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from evaclip.errors import UserError
from evaclip.train import checkpoint
from evaclip.train.checkpoint import Content, DamagedCheckpoint, NotWritten
from evaclip.train.config import CheckpointConfig
from evaclip.train.saver import Saver
from evaclip.weights import find_weights


def content(value: float, *, good: bool = True) -> Content:
    return Content(
        model={"weight": torch.full((3,), value)},
        ema={"weight": torch.full((3,), value + 1)},
        moments={"weight.exp_avg": torch.full((3,), value + 2.0)},
        descriptions={"preprocess.json": {"image_size": 8}},
        state={"step": int(value), "nested": {"tensor": torch.ones(2), "list": [1, "a", (2.0, None)]}},
        meta={"good": good},
    )


def save(root: Path, *steps: int) -> list[Path]:
    return [checkpoint.save(root, step, content(step)) for step in steps]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_everything_comes_back(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, 7)
    assert folder == tmp_path / "step_00000007"
    files = ["ema.safetensors", "meta.json", "model.safetensors", "optimizer", "preprocess.json", "random", "state.pt"]
    assert names(folder) == files
    assert names(tmp_path) == ["latest", "step_00000007"]
    meta = checkpoint.read_meta(folder)
    assert (meta["step"], meta["good"]) == (7, True)
    state = checkpoint.load_state(folder)
    assert state["nested"]["list"] == [1, "a", (2.0, None)]
    assert find_weights(tmp_path / "latest", "tiny") == folder / "ema.safetensors"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "truncated"),
        ("optimizer/00000.safetensors", "changed"),
        ("state.pt", "missing"),
        ("preprocess.json", "changed"),
        ("meta.json", "truncated"),
    ],
)
def test_damaged_checkpoint_falls_back_to_the_previous(tmp_path: Path, name: str, damage: str) -> None:
    older, newer = save(tmp_path, 1, 2)
    path = newer / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=name):
        checkpoint.read_meta(newer)
    said: list[str] = []
    assert checkpoint.find("auto", tmp_path, said.append) == older
    assert len(said) == 1
    assert str(newer) in said[0]
    with pytest.raises(UserError, match=r"damaged.*--resume auto"):
        checkpoint.find("latest", tmp_path, said.append)


def test_auto_without_a_whole_checkpoint(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 1, 2)
    (older / "state.pt").unlink()
    (newer / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=rf"--resume weights:{older} --set name=NAME"):
        checkpoint.find("auto", tmp_path, pytest.fail)
    (older / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="their weights are damaged too; --overwrite"):
        checkpoint.find("auto", tmp_path, pytest.fail)


@pytest.mark.parametrize("pointer", [b"", b"step_000", b"\xff\xfe"])
def test_a_damaged_pointer_hides_nothing(tmp_path: Path, pointer: bytes) -> None:
    (folder,) = save(tmp_path, 1)
    (tmp_path / "latest").write_bytes(pointer)
    assert checkpoint.find("auto", tmp_path, pytest.fail) == folder


def test_what_is_asked_for_is_found(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 1, 2)
    for request, expected in {"none": None, "auto": newer, "latest": newer, str(older): older}.items():
        assert checkpoint.find(request, tmp_path, pytest.fail) == expected
    assert checkpoint.find("auto", tmp_path / "nowhere", pytest.fail) is None
    with pytest.raises(UserError, match=r"no checkpoint folder 'nonsense'.*auto, latest"):
        checkpoint.find("nonsense", tmp_path, pytest.fail)
    with pytest.raises(UserError, match="no checkpoint folder"):
        checkpoint.find("latest", tmp_path / "nowhere", pytest.fail)


@pytest.mark.parametrize("part", ["model", "state"])
def test_files_that_may_not_grow_leave_the_earlier_one(tmp_path: Path, part: str) -> None:
    """As on a full disk: safetensors, torch and Python each raise something else."""
    (older,) = save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = replace(content(2), **{part: {"weight": torch.zeros(100_000)}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(NotWritten):
            checkpoint.save(tmp_path, 2, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert checkpoint.find("auto", tmp_path, pytest.fail) == older


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (older,) = save(tmp_path, 1)
    (tmp_path / ".unfinished-step_00000002" / "optimizer").mkdir(parents=True)
    (tmp_path / ".unfinished-latest").touch()
    assert checkpoint.find("auto", tmp_path, pytest.fail) == older
    checkpoint.remove_unfinished(tmp_path)
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_a_checkpoint_is_deleted_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who joins its weights meanwhile would put a file into a folder that is being emptied, which ended the run."""
    older, _ = save(tmp_path, 1, 2)
    original = shutil.rmtree

    def delete(folder: Path, **options: bool) -> None:
        assert not older.exists()
        original(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", delete)
    checkpoint.prune(tmp_path, 2, keep=1, keep_every=None)
    assert names(tmp_path) == ["latest", "step_00000002"]


def test_going_back_leaves_no_newer_checkpoint(tmp_path: Path) -> None:
    older, _ = save(tmp_path, 1, 2)
    checkpoint.go_back_to(older)
    assert names(tmp_path) == ["latest", "step_00000001"]

    older, *_ = save(tmp_path, 1, 2, 3, 4)
    checkpoint.go_back_to(older, keep_every=2)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002", "step_00000004"]
    assert checkpoint.find("auto", tmp_path, pytest.fail) == older


def test_state_is_not_unpickled(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, 1)
    torch.save({"code": Path("x")}, folder / "state.pt")
    with pytest.raises(Exception, match="weights_only"):
        checkpoint.load_state(folder)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, 1)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(DamagedCheckpoint, match="format"):
        checkpoint.read_meta(folder)


class Gpu:
    """A stand-in for a GPU's streams and events: copies run when the host or the compute stream waits for them."""

    def __init__(self) -> None:
        self.copies: list[Callable[[], None]] = []
        self.pinned = 0
        self.finished_updates = 0
        self.writing = threading.Event()

    def wait_stream(self, compute: "Gpu") -> None:
        self.finished_updates += 1

    def record_event(self) -> "Gpu":
        return self

    def wait_event(self, event: "Gpu") -> None:
        while self.copies:
            self.copies.pop(0)()

    def synchronize(self) -> None:
        assert self.writing.wait(10)
        self.wait_event(self)


def test_gpu_copies_before_the_next_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()

    class OnGpu(Tensor):
        is_cuda = True

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.to:
                pytest.fail("the host waits for a copy")
            if func is torch.empty_like:
                gpu.pinned += kwargs["pin_memory"]
                return torch.full(args[0].shape, math.nan)
            if func is Tensor.copy_:
                assert kwargs["non_blocking"]
                gpu.copies.append(lambda: copy(*args))
                return args[0]
            return super().__torch_function__(func, types, args, kwargs or {})

    def copy(target: Tensor, source: Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            target.copy_(source)

    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    weight = torch.zeros(3).as_subclass(OnGpu)
    config = CheckpointConfig(keep=9)
    with Saver(tmp_path, config, None, pytest.fail, torch.device("cuda")) as saver:
        for step in (0, 1):
            gpu.writing.clear()
            saver.start(step, replace(content(step), model={"weight": weight}))
            assert len(gpu.copies) == 1
            saver.hold_updates()
            weight += 1
            gpu.writing.set()
            saver.finish()
        saver.start(2, replace(content(2), model={"weight": weight}))
    written = [load_file(tmp_path / f"step_0000000{step}/model.safetensors")["weight"] for step in range(3)]
    assert [value.tolist() for value in written] == [[0.0] * 3, [1.0] * 3, [2.0] * 3]
    assert (gpu.pinned, gpu.finished_updates) == (1, 3)
