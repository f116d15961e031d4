"""Traces of chosen steps, the garbage collector at fixed steps, and the watchdog."""

import gc
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from evaclip.train.tracing import collecting, tracing
from evaclip.train.trainer import train
from evaclip.train.watchdog import EXIT_CODE, Watchdog


def test_run_traces_chosen_steps(run_config: Any) -> None:
    folder = train(run_config("gc_every_steps=2", "log.profile_steps=[3, 5]")).folder
    (file,) = (folder / "traces").iterdir()
    assert file.name == "rank_0.json"
    names = [event.get("name") for event in json.loads(file.read_text())["traceEvents"]]
    assert "aten::mm" in names
    assert "[memory]" in names
    assert [sum(name == f"ProfilerStep#{step}" for name in names) > 0 for step in range(6)] == [0, 0, 1, 1, 1, 0]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_trace_of_resumed_run_starts_at_its_step(tmp_path: Path) -> None:
    said: list[str] = []
    for finished, recorded in ((8, True), (12, False)):
        file = tmp_path / str(finished) / "rank_1.json"
        with tracing(file, (10, 12), finished, said.append) as end_step:
            for _ in range(6):
                torch.ones(2).sin()
                end_step()
        assert file.exists() == recorded
    assert said == [f"traced steps 10 to 12: {tmp_path / '8' / 'rank_1.json'}"]


def test_trace_without_room_leaves_the_run_alone(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "file").touch()
    with tracing(tmp_path / "file" / "rank_0.json", (1, 1), 0, said.append) as end_step:
        end_step()
    assert said[0].startswith("no trace: ")


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


@pytest.mark.parametrize("options", [None, "abort=True", "abort=True, limit=0.5"])
def test_who_hangs_where_and_the_end_of_it(options: str | None) -> None:
    program = HANGING
    if options:
        program = HANGING.replace(", abort=True", ", abort=False").replace('phase("data")', f'phase("data", {options})')
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert result.returncode == EXIT_CODE == os.EX_TEMPFAIL
    assert "watchdog: process 3" in result.stderr
    assert "has been in 'data' for" in result.stderr
    assert "fetch_a_batch_that_never_comes" in result.stderr
    assert "watchdog: process 3: its last collectives are written" in result.stderr


def test_phases_that_end_in_time_are_not_told(capfd: pytest.CaptureFixture[str]) -> None:
    watchdog = Watchdog(0, 0.5, abort=False)
    for _ in range(8):
        with watchdog.phase("evaluation"), watchdog.phase("step"):
            time.sleep(0.1)
    with watchdog.phase("saving", limit=5):
        time.sleep(0.8)
    watchdog.close()
    assert capfd.readouterr().err == ""
