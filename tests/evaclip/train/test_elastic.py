"""torchrun starts all processes anew when one dies, and the run ends as if nothing had been."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from evaclip.train.config import TrainConfig
from evaclip.train.overrides import dump_yaml
from evaclip.train.progress import read_log
from evaclip.train.trainer import train

pytestmark = pytest.mark.exhaustive

STEPS = 12


@pytest.mark.slow
def test_a_killed_process_changes_nothing(run_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """With whole parameters; what is cut up meets the same in `test_faults.py`."""
    common = [f"schedule={{steps: {STEPS}, name: constant}}", "checkpoint.every_steps=3", "optim.name=lamb"]
    straight = train(run_config(*common, "name=straight")).folder
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(run_config(*common, "parallel.mode=replicate")))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        "-m", "evaclip", "train", "tiny", "--config", str(path), "--resume", "auto",
    ]  # fmt: skip
    # Without the first, restarts meet the addresses of the processes that died.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    killed = False
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as torchrun:
        for line in torchrun.stdout:
            lines.append(line)
            if line.startswith("step 7/") and not killed:
                killed = True
                _second(torchrun.pid).send_signal(signal.SIGKILL)
        assert torchrun.wait(timeout=120) == 0, "".join(lines)
    assert killed
    records = [record for record in read_log(tmp_path / "run" / "log.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    expected = [record["loss"] for record in read_log(straight / "log.jsonl") if "loss" in record]
    assert [record["loss"] for record in records] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_mistake_is_not_made_for_ever(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom evaclip.commands.main import main\n"
        f"with open({str(starts)!r}, 'a') as file: file.write(os.environ['RANK'])\n"
        "sys.exit(main(['train', 'tiny', '--set', 'optim.speed=1']))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "20"]
    done = subprocess.run([*command, str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert len(starts.read_text()) <= 4
    assert "optim.speed" in done.stderr
    assert "torchrun stops" in done.stderr


def _second(torchrun: int) -> psutil.Process:
    """The process of rank 1."""
    workers = [child for child in psutil.Process(torchrun).children() if child.environ().get("RANK") == "1"]
    return workers[0]


FAILING = """
import os, sys, torch
from evaclip.commands.main import main
from evaclip.train.step import TrainStep
from evaclip.train.trainer import TrainingDiverged

def fail(self, *args, **options):
    if {kind!r} == "diverged":
        raise TrainingDiverged("the loss was not finite")
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return step(self, *args, **options)

with open({starts!r}, "a") as file:
    file.write(os.environ["RANK"])
step, TrainStep.__call__ = TrainStep.__call__, fail
sys.exit(main(["train", "tiny", "--config", {config!r}, "--resume", "auto"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diverged", "memory"])
def test_final_error_starts_once(kind: str, run_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """In one rank or in all; torchrun ends with an error that no batch script takes for a stop by a signal."""
    starts, program, path = tmp_path / "starts", tmp_path / "program.py", tmp_path / "config.yaml"
    path.write_text(dump_yaml(run_config()))
    program.write_text(FAILING.format(kind=kind, starts=str(starts), config=str(path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    done = subprocess.run([*command, str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert sorted(starts.read_text()) == ["0", "1"]
