"""SLURM and torchrun, which start the processes of a run."""

import os
import re
import signal
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

_PORTS = range(20000, 30000)


def take_over(environment: MutableMapping[str, str] = os.environ) -> tuple[int, int]:
    """Sets torchrun's environment variables if `srun` started this process as one of several.

    MASTER_ADDR and MASTER_PORT keep values that are already set.

    Returns:
        rank and number of ranks; 0 and 1 of a process that was started alone.
    """
    # A batch script and its children without srun aren't part of a step.
    size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if size == 1 or "WORLD_SIZE" in environment:
        return int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    node, job, step = (int(environment[f"SLURM_{name}"]) for name in ("NODEID", "JOB_ID", "STEP_ID"))
    ours = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "GROUP_RANK": str(node),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(_tasks_of(environment["SLURM_STEP_TASKS_PER_NODE"])[node]),
        "MASTER_ADDR": _first_host(environment["SLURM_STEP_NODELIST"]),
        # Several jobs, and steps of one, may share a node.
        "MASTER_PORT": str(_PORTS[(31 * job + step) % len(_PORTS)]),
    }
    for name, value in ours.items():
        environment.setdefault(name, value)
    return int(environment["RANK"]), size


def _tasks_of(counts: str) -> list[int]:
    """The tasks of each node: `8(x2),4` is 8, 8, 4."""
    found = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(","))
    return [int(match[1]) for match in found if match for _ in range(int(match[2] or "1"))]


def _first_host(hosts: str) -> str:
    """Of a list as `rack1n[04-07,12],login`: `rack1n04`."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", hosts)[0])


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or `srun` started this process, so that it may be started again."""
    return "TORCHELASTIC_RUN_ID" in environment or "SLURM_STEP_ID" in environment


def stop_restarts(mistake: str, *, at_once: bool = False) -> None:
    """Ends torchrun's agent if the previous start failed with the same error; without torchrun does nothing.

    A file system may be back at the second start, but a wrong key fails in every start. torchrun restarts after any
    exit code, so the agent gets a SIGTERM.

    Args:
        mistake: the message that identifies the error.
        at_once: end the agent after the first failure.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_N/LOCAL_RANK/error.json
    if error_file is None:
        return
    folder = Path(error_file).parents[2]
    before = folder / f"mistake-{Path(error_file).parent.name}.txt"
    if not (at_once or (before.is_file() and before.read_text(encoding="utf-8") == mistake)):
        before.write_text(mistake, encoding="utf-8")
        return
    print("another start would fail in the same way: torchrun stops", file=sys.stderr, flush=True)
    with suppress(FileExistsError):  # another rank has sent the signal, and a second one would interrupt the clean-up
        (folder / "stopped").touch(exist_ok=False)
        os.kill(os.getppid(), signal.SIGTERM)
