"""The supervisor of `make gpu-check` under disasters, with stages that make them: each costs its own case alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUN = "import sys; from benchmarks.gpu_check.cli import main; sys.exit(main(sys.argv[1:], package='fake_stages'))"
HEAD = """
import os, signal, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu_check.stage import Failure, Refusal, Unit

SECONDS = 540
"""

DISASTERS = """
def units(settings):
    return [
        Unit("disasters", "all", limit=20, value=80),
        Unit("disasters", "hang", limit=1.5, value=70),
        Unit("disasters", "import", value=60),
        Unit("disasters", "late", value=50),
    ]

def wrong():
    raise Failure("error 0.5, at most 0.1 is right", {"error": 0.5})

def refuse():
    raise Refusal("no ncu here")

def hang():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (Path(__file__).parents[1] / "grandchild").write_text(str(child.pid))
    time.sleep(600)

def run(unit, session):
    fine = lambda: {"value": 1}
    if unit.name == "import":
        print("no symbol of this name", file=sys.stderr, flush=True)
        os._exit(7)
    if unit.name == "hang":
        session.case("hang", hang)
    if unit.name == "all":
        session.case("first", fine)
        session.case("trap", os.abort)
        session.case("wrong", wrong)
        session.case("raises", lambda: 1 / 0)
        session.case("not here", refuse)
        session.case("kill", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    session.case("last", fine)
"""


def stages(top: Path, **modules: str) -> dict[str, str]:
    """Makes a package of stages; returns the environment in which it is found."""
    folder = top / "fake_stages"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(HEAD + text)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(top)]), "OMP_NUM_THREADS": "1"}


def start(top: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, "--rehearsal", "--out", str(top), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def check(top: Path, environment: dict[str, str], *options: str) -> tuple[int, str]:
    process = start(top, environment, *options)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output + errors


def journal_of(top: Path) -> Path:
    (found,) = top.glob("*.jsonl")
    return found


def records_of(top: Path, kind: str) -> dict[tuple[str, str], dict[str, Any]]:
    lines = [json.loads(line) for line in journal_of(top).read_text().splitlines()]
    return {(line["unit"], line["case"]): line for line in lines if line["record"] == kind}


def test_each_disaster_costs_its_own_case_alone(tmp_path: Path) -> None:
    environment = stages(tmp_path, disasters=DISASTERS)
    status, output = check(tmp_path, environment)
    assert status == 1, output
    ended = {key: line["status"] for key, line in records_of(tmp_path, "end").items()}
    fine = {("all", "first"), ("all", "last"), ("hang", "last"), ("late", "last")}
    assert {key for key, status in ended.items() if status == "passed"} == fine
    assert {key: status for key, status in ended.items() if status != "passed"} == {
        ("all", "wrong"): "failed",
        ("all", "raises"): "failed",
        ("all", "not here"): "refused",
    }
    assert records_of(tmp_path, "end")["all", "wrong"]["data"] == {"error": 0.5}
    died = records_of(tmp_path, "died")
    assert set(died) == {("all", "trap"), ("all", "kill"), ("hang", "hang"), ("import", None)}
    assert died["all", "trap"]["signal"] == signal.SIGABRT
    assert died["all", "kill"]["signal"] == signal.SIGSEGV
    assert died["hang", "hang"]["error"] == "killed after 1.5 s"
    assert died["import", None]["exit"] == 7
    assert "no symbol of this name" in died["import", None]["stderr"]
    assert_gone(int((tmp_path / "grandchild").read_text()))
    summary = json.loads(journal_of(tmp_path).with_suffix(".summary.json").read_text())
    counts = {"passed": 4, "failed": 2, "died": 4, "refused": 1}
    assert summary["stages"]["disasters"] | counts == summary["stages"]["disasters"]
    assert not summary["open"]
    assert "refused disasters: all: not here: no ncu here" in output


def assert_gone(process: int) -> None:
    for _ in range(100):
        try:
            os.kill(process, 0)
            if "zombie" in Path(f"/proc/{process}/status").read_text():
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {process} lives on")
