"""Traces by request, the garbage collector at fixed steps, and the watchdog."""

import gc
import json
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from evaclip.train.tracing import REQUEST, STEPS, Tracer, collecting
from evaclip.train.trainer import Trainer, train
from evaclip.train.watchdog import EXIT_CODE, Watchdog


def test_a_run_traces_its_steps_when_a_file_asks(run_config, tmp_path, monkeypatch):
    step = Trainer._step

    def asking(self: Trainer, batch: Any) -> Any:
        if self.position.step == 1:
            (self.folder.path / REQUEST).touch()
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_step", asking)
    folder = train(run_config("gc_every_steps=2")).folder
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


HANGING = """
import time
from evaclip.train.watchdog import Watchdog

def fetch_a_batch_that_never_comes():
    time.sleep(60)

watchdog = Watchdog(3, 0.2, abort=True, record=lambda: "its last collectives are written")
with watchdog.phase("step"):
    pass
with watchdog.phase("data"):
    fetch_a_batch_that_never_comes()
"""


@pytest.mark.parametrize("of_phase", [False, True])
def test_who_hangs_where_and_the_end_of_it(of_phase: bool) -> None:
    program = HANGING
    if of_phase:
        program = HANGING.replace(", abort=True", ", abort=False").replace('phase("data")', 'phase("data", abort=True)')
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert result.returncode == EXIT_CODE
    assert "watchdog: process 3" in result.stderr
    assert "has been in 'data' for" in result.stderr
    assert "fetch_a_batch_that_never_comes" in result.stderr
    assert "watchdog: process 3: its last collectives are written" in result.stderr


def test_phases_that_end_in_time_are_not_told(capfd: pytest.CaptureFixture[str]) -> None:
    watchdog = Watchdog(0, 0.5, abort=False)
    for _ in range(8):
        with watchdog.phase("evaluation"), watchdog.phase("step"):
            time.sleep(0.1)
    watchdog.close()
    assert capfd.readouterr().err == ""
