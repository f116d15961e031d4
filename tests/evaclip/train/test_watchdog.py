"""A process that hangs is named, with its stack."""

import subprocess
import sys
import time

import pytest

from evaclip.train.watchdog import EXIT_CODE, Watchdog

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
