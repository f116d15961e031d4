"""Runs of two ranks that lose or wait for one: the batch script, or torchrun, starts them again; they end bit-exactly.

`srun` and `scontrol` are stand-ins. The stand-in of `srun` starts two tasks with SLURM's variables and returns the
highest status, 128 + the signal's number for a killed task, as SLURM's does.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import in_processes
from sharded_run import train_all
from trained_runs import assert_equal, column, weights

from evaclip.train.config import TrainConfig
from evaclip.train.overrides import dump_yaml

pytestmark = pytest.mark.exhaustive

SCRIPT = Path(__file__).parents[3] / "examples" / "slurm" / "train.sbatch"
REPEATED = (("killed", "torchrun"), ("step hangs", "srun"), ("save hangs", "torchrun"))
LIMIT = 6
"""Seconds after which a hanging step or save is ended."""
EVACLIP = """#!{python}
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from evaclip.commands.main import main
from evaclip.train import checkpoint
from evaclip.train.step import TrainStep

kind, struck = os.environ["KIND"], Path(os.environ["STRUCK"])
step, write, writes = TrainStep.__call__, checkpoint._write_tensors, []

def is_time(at):
    if not at or os.environ.get("RANK") != "1" or struck.exists():
        return False
    struck.touch()
    return True

def call(self, batch, number, **options):
    if is_time(number == 5 and kind != "save hangs"):
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    return step(self, batch, number, **options)

def write_tensors(*args):
    writes.append(args)
    if is_time(len(writes) == 4 and kind == "save hangs"):  # each checkpoint has three files
        time.sleep(600)
    return write(*args)

TrainStep.__call__, checkpoint._write_tensors = call, write_tensors
sys.exit(main(sys.argv[1:]))
"""
SRUN = """#!{python}
import os, subprocess, sys, time
command = [word for word in sys.argv[1:] if not word.startswith("--cpus") and "exit" not in word and "wait" not in word]
common = {{
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0",
}}
tasks = [
    subprocess.Popen(command, env=os.environ | common | {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
    for rank in range(2)
]
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""


def write_programs(folder: Path) -> None:
    scontrol = f"#!/bin/sh\necho $1 >> {folder}/requeued\n"
    for name, text in (("evaclip", EVACLIP), ("srun", SRUN), ("scontrol", scontrol)):
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(0o755)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    ("kind", "launcher"),
    [("killed", "srun"), ("step hangs", "torchrun"), ("save hangs", "srun")]
    + [pytest.param(kind, launcher, marks=pytest.mark.weekly) for kind, launcher in REPEATED],
)
def test_interrupted_run_ends_bit_exactly(
    kind: str, launcher: str, run_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    common = ["parallel.mode=shard", "checkpoint.every_steps=2", "schedule.steps=8", "optim.name=lamb", "ema_decay=0.5"]
    in_processes(2, train_all, (run_config(*common, "name=straight"), "none"))
    limits = [f"watchdog.seconds={LIMIT}", f"parallel.saving_timeout_minutes={LIMIT / 60}"]
    (tmp_path / "config.yaml").write_text(dump_yaml(run_config(*common, *limits)))
    write_programs(tmp_path)
    arguments = ["tiny", "--config", "config.yaml"]
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "KIND": kind, "STRUCK": str(tmp_path / "struck"),
        "SLURM_CPUS_PER_TASK": "1", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
        "SLURM_JOB_ID": str(os.getpid()),
    }  # fmt: skip
    command = ["bash", str(SCRIPT), *arguments]
    if launcher == "torchrun":
        del environment["MASTER_ADDR"]
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", "1", "--no-python", str(tmp_path / "evaclip"), "train", *arguments]
        command += ["--resume", "auto"]
    starts, said = [], ""
    for _ in range(2 if launcher == "srun" else 1):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        starts.append(done.returncode)
        said += done.stdout + done.stderr
    first = 137 if kind == "killed" else os.EX_TEMPFAIL
    assert starts == ([first, 0] if launcher == "srun" else [0]), said
    assert (tmp_path / "struck").exists()
    if launcher == "srun":
        assert (tmp_path / "requeued").read_text() == "requeue\n"
    phase = "saving" if kind == "save hangs" else "step"
    hung = [int(seconds) for seconds in re.findall(rf"process 1 .* has been in '{phase}' for (\d+) s", said)]
    print(f"ended after {hung} s")
    assert hung == [] if kind == "killed" else LIMIT <= hung[0] <= 1.5 * LIMIT
    assert column(tmp_path / "run", "loss")[-2:] == column(tmp_path / "straight", "loss")[-2:]
    for file in ("model", "ema"):
        assert_equal(weights(tmp_path / "run", 8, file), weights(tmp_path / "straight", 8, file))
