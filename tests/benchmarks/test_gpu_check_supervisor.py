"""The supervisor of `make gpu-check` under disasters, with stages that make them: each costs its own case alone."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check.records import Journal
from benchmarks.gpu_check.stage import Failure, Refusal, Session, Settings, Unit

ROOT = Path(__file__).parents[2]
RUN = "import sys; from benchmarks.gpu_check.cli import main; sys.exit(main(sys.argv[1:], package='fake_stages'))"
HEAD = """
import os, signal, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu_check.stage import Failure, Refusal, Unit

SECONDS = 540
TOP = Path(__file__).parents[1]

def fine():
    return {"value": 1}
"""

DISASTERS = """
def units(settings):
    return [
        Unit("disasters", "all", limit=60, value=80),
        Unit("disasters", "hang", limit=2, value=70),
        Unit("disasters", "import", value=60),
        Unit("disasters", "late", value=50),
    ]

def wrong():
    raise Failure("error 0.5, at most 0.1 is right", {"error": 0.5})

def refuse():
    raise Refusal("no ncu here")

def hang():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (TOP / "grandchild").write_text(str(child.pid))
    time.sleep(600)

def run(unit, session):
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

SLOW = """
def units(settings):
    return [Unit("slow", name, value=-ord(name)) for name in "abc"]

def wait(unit):
    (TOP / "begun").write_text(unit.name)
    while unit.name == "b" and not (TOP / "go").exists():
        time.sleep(0.02)

def run(unit, session):
    session.case("only", lambda: wait(unit))
"""

BROKEN = """
def units(settings):
    raise RuntimeError("no such table")
"""


@pytest.fixture
def stages(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Makes a package of stages; returns the environment in which it is found."""

    def make(**modules: str) -> dict[str, str]:
        folder = tmp_path / "fake_stages"
        folder.mkdir()
        (folder / "__init__.py").touch()
        for name, text in modules.items():
            (folder / f"{name}.py").write_text(HEAD + text)
        return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "OMP_NUM_THREADS": "1"}

    return make


def start(top: Path, environment: dict[str, str], *options: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, "--rehearsal", "--out", str(top), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, **more)


def check(top: Path, environment: dict[str, str], *options: str, **more: Any) -> tuple[int, str]:
    process = start(top, environment, *options, **more)
    output, errors = process.communicate(timeout=600)
    return process.returncode, output + errors


def journal_of(top: Path) -> Path:
    (found,) = top.glob("*.jsonl")
    return found


def records_of(top: Path, kind: str) -> dict[tuple[str, str], dict[str, Any]]:
    lines = [json.loads(line) for line in journal_of(top).read_text().splitlines()]
    return {(line["unit"], line["case"]): line for line in lines if line["record"] == kind}


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_gone(process: int) -> bool:
    """Whether it has ended, if only for its parent to take notice."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.exhaustive
@pytest.mark.slow
def test_each_disaster_costs_its_own_case_alone(stages: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    status, output = check(tmp_path, stages(disasters=DISASTERS, broken=BROKEN))
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
    assert died["hang", "hang"]["error"] == "killed after 2 s"
    assert died["import", None]["exit"] == 7
    assert "no symbol of this name" in died["import", None]["stderr"]
    wait_for(lambda: is_gone(int((tmp_path / "grandchild").read_text())))
    summary = json.loads(journal_of(tmp_path).with_suffix(".summary.json").read_text())
    counts = {"passed": 4, "failed": 2, "died": 4, "refused": 1}
    assert summary["stages"]["disasters"] | counts == summary["stages"]["disasters"]
    assert not summary["open"]
    assert "refused disasters: all: not here: no ncu here" in output
    assert "FAILED broken: RuntimeError: no such table" in output
    assert "| disasters | 4 | 2 | 4 | 1 |" in journal_of(tmp_path).with_suffix(".summary.md").read_text()


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_is_resumed(stages, tmp_path, number):
    environment = stages(slow=SLOW)
    process = start(tmp_path, environment)
    wait_for(lambda: ("b", "only") in records_of(tmp_path, "begin") if list(tmp_path.glob("*.jsonl")) else False)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 3
        assert "open, for --resume: slow: b, slow: c" in output
    assert set(records_of(tmp_path, "end")) == {("a", "only")}
    with journal_of(tmp_path).open("a") as journal:
        journal.write('{"record": "end", "sta')  # what a cut in the power leaves
    (tmp_path / "go").touch()
    status, output = check(tmp_path, environment, "--resume", str(journal_of(tmp_path)))
    assert status == 0, output
    assert set(records_of(tmp_path, "end")) == {(name, "only") for name in "abc"}
    assert [line["status"] for line in records_of(tmp_path, "end").values()] == ["passed"] * 3


@pytest.mark.exhaustive
def test_a_run_stops_in_time_with_the_most_valuable_first(stages, tmp_path):
    status, output = check(tmp_path, stages(slow=SLOW), "--budget", "2")
    assert status == 3, output
    assert set(records_of(tmp_path, "end")) <= {("a", "only")}
    assert "open, for --resume: " in output
    assert "slow: c" in output


@pytest.mark.exhaustive
def test_a_full_disk_ends_with_one_line(stages: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    many = "def units(settings):\n    return [Unit('many', 'a')]\n\ndef run(unit, session):\n"
    many += "    for number in range(100):\n        session.case(f'{number:90d}', fine)\n"

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    status, output = check(tmp_path, stages(many=many), preexec_fn=small_disk)
    assert status == 5, output
    assert len([line for line in output.splitlines() if line.startswith("error: ")]) == 1
    assert "error: cannot write " in output
    assert "File too large; what it holds is whole: --resume" in output
    assert len(records_of(tmp_path, "end")) > 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_stage_says_so(stages: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    call = [sys.executable, "-c", RUN, "--out", tmp_path]
    environment = stages(slow=SLOW, broken=BROKEN)
    result = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 4
    assert result.stdout.splitlines() == ["broken: no GPU", "slow: no GPU"]
    assert not list(tmp_path.glob("*.jsonl"))


def test_the_supervisor_does_not_hold_torch() -> None:
    code = "import sys, benchmarks.gpu_check.cli, benchmarks.gpu_check.child; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def session_of(tmp_path: Path) -> Session:
    journal = Journal(tmp_path / "journal.jsonl")
    if not journal.path.exists():
        journal.append("header", schema=1)
    return Session(Unit("stage", "unit"), Settings(device="cpu"), journal, time.monotonic() + 60)


def test_a_session_records_and_leaves_out_what_was_recorded(tmp_path: Path) -> None:
    def refuse() -> None:
        raise Refusal("not here")

    def fail() -> None:
        raise Failure("wrong", {})

    session = session_of(tmp_path)
    session.case("passed", lambda: {"value": 1})
    session.case("refused", refuse)
    session.case("failed", fail)
    again = session_of(tmp_path)
    again.case("passed", lambda: pytest.fail("it was run before"))
    assert all(again.done(name) for name in ("passed", "refused", "failed"))
    assert again.earlier("stage", "unit", "passed") == {"value": 1}
    assert again.earlier("stage", "unit", "failed") is None
    again.deadline = time.monotonic()
    again.case("late", lambda: pytest.fail("the time is over"))
    assert not again.complete
    ends = [record for record in session._journal.read() if record["record"] == "end"]
    assert [(end["case"], end["status"], end["error"]) for end in ends] == [
        ("passed", "passed", ""),
        ("refused", "refused", "not here"),
        ("failed", "failed", "wrong"),
    ]
