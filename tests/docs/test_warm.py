"""What runs in a fork of a Python that has imported torch does as it would in a Python of its own."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from warm import environment, warm

pytestmark = pytest.mark.exhaustive
PYTHON = Path(sys.executable)
Bash = Callable[..., subprocess.CompletedProcess[str]]
SCRIPTS = (
    "echo in | python -c 'import sys; print(__name__, sys.argv, sys.path[:2], sys.executable, input())' a -b",
    'A=1 python -c \'import os; print(os.getcwd(), {**os.environ, "PATH": 0, "_": 0})\'',
    "echo 'import sys; print(__name__, __file__, sys.argv, sys.path[0])' > one.py; python one.py 1; python -m one 2",
    "PYTHONPATH=sub python -c 'import sys; print(sys.path[1])'; python -V; echo 'print(1)' | python",
    "python -c 'import atexit; atexit.register(print, 5); raise SystemExit(3)'",
    "python -c 'import threading, time; threading.Thread(target=lambda: time.sleep(0.1) or print(6)).start()'",
    "python -c 'from multiprocessing import get_context; print(get_context(\"spawn\").Pool(1).map(abs, [-1]))'",
    "python -c 'import sys; sys.exit(\"why\")' 2>&1",
    "python -c 'import os; os.abort()'",
    "python -c 'print(runpy)' 2>&1 | tail -1",
    "evaclip plan --help; evaclip nope 2>&1",
)


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bash]:
    """Runs a script, with the warm Python or with the one that it stands for."""
    folder = tmp_path_factory.mktemp("warm")
    with warm(PYTHON, environment(PYTHON, folder)) as programs:

        def run(script: str, *front: Path) -> subprocess.CompletedProcess[str]:
            chosen = environment(PYTHON, folder, *front)
            return subprocess.run(["bash", "-c", script], cwd=folder, env=chosen, capture_output=True, text=True)

        yield lambda script, is_warm=True: run(script, *[programs] * is_warm)


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_does_as_python(bash: Bash, script: str) -> None:
    ours, pythons = bash(script), bash(script, is_warm=False)
    assert (ours.returncode, ours.stdout) == (pythons.returncode, pythons.stdout), ours.stderr


def test_warm_process_has_torch_and_no_evakernels(bash: Bash) -> None:
    code = "import sys; print(sorted({'torch', 'evakernels', 'evaclip', 'benchmarks', 'run_docs'} & {*sys.modules}))"
    assert bash(f'python -c "{code}"').stdout == "['torch']\n"


def test_it_ends_with_whoever_started_it(bash: Bash) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    process = bash(f"timeout 1 python -c '{code}'").stdout.strip()
    assert bash(f"for i in $(seq 100); do kill -0 {process} 2> none || exit 7; sleep 0.1; done").returncode == 7
