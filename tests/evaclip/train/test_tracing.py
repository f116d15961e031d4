"""A trace by request, and the garbage collector at fixed steps."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import torch

from evaclip.train.tracing import REQUEST, STEPS, Tracer, collecting
from evaclip.train.trainer import Trainer, train


def test_a_run_traces_its_steps_when_a_file_asks(run_config, tmp_path, monkeypatch):
    step = Trainer._step

    def asking(self: Trainer, batch: Any) -> Any:
        if self.position.step == 1:
            (self.folder.path / REQUEST).touch()
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_step", asking)
    folder = train(run_config("collect_every=2")).folder
    assert not (folder / REQUEST).exists()
    # Steps 3, 4 and 5 of six.
    (file,) = (folder / "traces").iterdir()
    assert file.name == f"step_{2 + STEPS:08d}.json"
    names = [event.get("name") for event in json.loads(file.read_text())["traceEvents"]]
    assert "aten::mm" in names
    assert "[memory]" in names
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_request_with_a_number_is_for_that_process(tmp_path: Path) -> None:
    said: list[str] = []
    tracers = [Tracer(tmp_path, torch.device("cpu"), said.append, rank, 3, every=5) for rank in range(3)]

    def trace(request: str) -> None:
        (tmp_path / REQUEST).write_text(request)
        for step in range(6, 6 + 5 + STEPS):  # the one step in which they look is 10
            for tracer in tracers:
                tracer.between(step)

    trace("2\n")
    assert [file.name for file in (tmp_path / "traces").iterdir()] == [f"step_{10 + STEPS:08d}-rank2.json"]
    for wrong in ("3", "all"):
        trace(wrong)
        assert said[-1] == f"no trace: want_trace names process '{wrong}'; expected 0 to 2"
    assert len(said) == 3
    assert not (tmp_path / REQUEST).exists()
    assert not any(tracer.is_on for tracer in tracers)


def test_a_trace_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / REQUEST).touch()
    (tmp_path / "traces").write_text("no folder")
    said: list[str] = []
    tracer = Tracer(tmp_path, torch.device("cpu"), said.append)
    for step in range(STEPS + 1):
        tracer.between(step)
    assert not tracer.is_on
    (line,) = said
    assert line.startswith("no trace: ")


def test_a_run_that_ends_within_a_trace_says_so(tmp_path: Path) -> None:
    (tmp_path / REQUEST).touch()
    said: list[str] = []
    tracer = Tracer(tmp_path, torch.device("cpu"), said.append)
    tracer.between(0)
    assert tracer.is_on
    tracer.close()
    assert not tracer.is_on
    assert said == ["no trace: the run ended within the 3 steps that it takes"]
    tracer.close()
    assert len(said) == 1


class _Cycle:
    def __init__(self) -> None:
        self.self = self


def test_garbage_is_collected_at_fixed_steps_alone() -> None:
    with collecting(3) as collect:
        assert not gc.isenabled()
        left = weakref.ref(_Cycle())
        collect(2)
        assert left() is not None
        collect(3)
        assert left() is None
    assert gc.isenabled()
    with collecting(None) as collect:
        assert gc.isenabled()
        collect(3)
