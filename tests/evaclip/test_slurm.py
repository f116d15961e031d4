"""SLURM 24.11's variables become torchrun's; the batch script requeues runs that another start may finish."""

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


class Cluster:
    """Stand-ins for srun, scontrol and evaclip in a folder, where the batch script runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        self._write("scontrol", f'printf "%s\\n" scontrol "$@" >> {self.calls}')
        self._write("evaclip", "printf '# Its name.\\nname: mine\\noutput: out\\n'")

    def _write(self, name: str, line: str) -> None:
        program = self.folder / name
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)

    def run(self, code: int) -> list[str]:
        """The words of the commands that the script starts if srun ends with `code`."""
        self._write("srun", f'printf "%s\\n" srun "$@" >> {self.calls}; exit {code}')
        self.calls.unlink(missing_ok=True)
        given = {"PATH": f"{self.folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "41", "SLURM_CPUS_PER_TASK": "12"}
        command = ["bash", str(SCRIPT), "tiny", "--set", "name=a b"]
        assert subprocess.run(command, env=given, cwd=self.folder, check=False).returncode == code
        return self.calls.read_text().splitlines()


@pytest.mark.parametrize(
    ("code", "is_requeued"),
    [(143, True), (75, True), (137, True), (134, True), (0, False), (1, False), (2, False), (130, False)],
)
def test_batch_script_requeues_unless_final(code: int, is_requeued: bool, tmp_path: Path) -> None:
    step = Cluster(tmp_path).run(code)
    if is_requeued:
        assert step[-3:] == ["scontrol", "requeue", "41"]
        del step[-3:]
    # The highest code of all is srun's: SIGTERM to the others, when one makes a mistake, would make that 143.
    assert step[:4] == ["srun", "--cpus-per-task=12", "--kill-on-bad-exit=0", "--wait=120"]
    assert step[4:] == ["evaclip", "train", "--workers", "11", "tiny", "--set", "name=a b", "--resume", "auto"]


def test_batch_script_counts_requeues_per_checkpoint(tmp_path: Path) -> None:
    """Three starts without a checkpoint, then three after each new one."""
    cluster = Cluster(tmp_path)
    for checkpoint in (None, "step_00000008", "step_00000010"):
        if checkpoint:
            (tmp_path / "out/mine/checkpoints" / checkpoint).mkdir(parents=True)
        assert ["scontrol" in cluster.run(75) for _ in range(5)] == [True, True, True, False, False]
