"""What `srun` tells, as SLURM 24.11 does, in the words of torchrun; and the batch script that starts it."""

import os
import subprocess
from pathlib import Path

import pytest

from evaclip.launchers import take_over

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "train.sbatch"
STEP = {
    "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "20", "SLURM_STEP_NODELIST": "n[04-05,9],m1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_PROCID": "17", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
}  # fmt: skip


def taken(**changes: str) -> dict[str, str]:
    """What is added to a step's environment."""
    environment = STEP | changes
    take_over(environment)
    return {name: value for name, value in environment.items() if name not in STEP}


def test_slurm_task_gets_rank() -> None:
    assert taken() == {
        "RANK": "17", "LOCAL_RANK": "1", "GROUP_RANK": "2", "WORLD_SIZE": "20", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "n04", "MASTER_PORT": "21274",
    }  # fmt: skip
    assert taken(SLURM_NODEID="1")["LOCAL_WORLD_SIZE"] == "8"
    assert taken(SLURM_STEP_ID="4")["MASTER_PORT"] != "21274"
    given = taken(MASTER_ADDR="10.0.0.1", MASTER_PORT="5")
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "5")


def test_slurm_first_host_is_master() -> None:
    for hosts, first in (("n1,n2", "n1"), ("a[007,3]x,b", "a007x"), ("r[1-2]n[3,5-8],z", "r1n3")):
        assert taken(SLURM_STEP_NODELIST=hosts)["MASTER_ADDR"] == first


def test_slurm_variables_are_ignored_elsewhere() -> None:
    assert taken(WORLD_SIZE="2") == {"WORLD_SIZE": "2"}
    assert taken(SLURM_STEP_NUM_TASKS="1") == {}
    script = {name: value for name, value in STEP.items() if not name.startswith("SLURM_STEP_")}
    take_over(script)
    assert "WORLD_SIZE" not in script


@pytest.mark.parametrize(("code", "is_requeued"), [(143, True), (0, False), (1, False)])
def test_batch_script_is_requeued_after_a_signal(code, is_requeued, tmp_path):
    told = tmp_path / "told"
    for name in ("srun", "scontrol"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> {told}\nexit {code if name == "srun" else 0}\n')
        program.chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "41", "SLURM_CPUS_PER_TASK": "12"}
    done = subprocess.run(["bash", SCRIPT, "tiny", "--set", "name=a b"], env=given, check=False)
    assert done.returncode == code
    step = told.read_text().splitlines()
    if is_requeued:
        assert step[-3:] == ["scontrol", "requeue", "41"]
        del step[-3:]
    # The highest code of all is srun's: SIGTERM to the others, when one makes a mistake, would make that 143.
    assert step[:4] == ["srun", "--cpus-per-task=12", "--kill-on-bad-exit=0", "--wait=120"]
    assert step[4:] == ["evaclip", "train", "--workers", "11", "tiny", "--set", "name=a b", "--resume", "auto"]
