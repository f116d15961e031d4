"""For which GPUs the build compiles, with programs in the place of nvcc and nvidia-smi."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = "evakernels/_build.json"
GPU_FILES = ("/dev/nvidia0", "/proc/driver/nvidia")
NVCC_13 = (13, 0, (75, 80, 86, 89, 90, 100, 103, 120))
NVCC_12_8 = (12, 8, (75, 80, 86, 89, 90, 100, 101, 120))
NVCC_12_4 = (12, 4, (75, 80, 86, 89, 90))
NO_GPU = "no NVIDIA GPU found (EVAKERNELS_CUDA=on builds for those of other machines)"
without_gpu = pytest.mark.skipif(any(Path(file).exists() for file in GPU_FILES), reason="this machine has a GPU")


def write_program(path: Path, answers: dict[str, str]) -> None:
    """A program that prints what `answers` has for its first argument, and fails where that has nothing."""
    cases = "".join(f"{argument}) printf '{answer}' ;;\n" for argument, answer in answers.items())
    path.write_text(f'#!/bin/sh\ncase "$1" in\n{cases}*) exit 1 ;;\nesac\n')
    path.chmod(0o755)


class Machine:
    """A folder of programs that comes first on PATH, and what the build decides there."""

    def __init__(self, folder: Path) -> None:
        self.programs, self.project = folder / "bin", folder / "project"
        self.programs.mkdir()
        write_program(self.programs / "nvidia-smi", {})
        # `build_py` records the decision, and needs no more than this.
        for name in ("evakernels", "evaclip"):
            (self.project / name).mkdir(parents=True)
            (self.project / name / "__init__.py").touch()
        for name in ("setup.py", "pyproject.toml", "README.md", "evakernels/_version.py"):
            (self.project / name).symlink_to(ROOT / name)

    def add_nvcc(self, major: int, minor: int, archs: tuple[int, ...]) -> None:
        listed = "".join(f"compute_{arch}\\n" for arch in archs)
        answers = {"--version": f"tools, release {major}.{minor}, V", "--list-gpu-arch": listed}
        write_program(self.programs / "nvcc", answers)

    def add_gpus(self, *capabilities: str) -> None:
        answers = {"--query-gpu=compute_cap": "".join(f"{found}\\n" for found in capabilities)}
        write_program(self.programs / "nvidia-smi", answers)

    def decide(self, **environment: str) -> tuple[dict, str]:
        """The record of the build (empty if it failed), and its output."""
        asked = {"EVAKERNELS_NATIVE": "auto", "EVAKERNELS_CUDA": "auto", "EVAKERNELS_CUDA_ARCHS": "", "CUDACXX": ""}
        path = {"PATH": os.pathsep.join([str(self.programs), os.environ["PATH"]])}
        command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"]
        done = subprocess.run(
            command, cwd=self.project, env=os.environ | asked | path | environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        record = self.project / "built" / RECORD
        return json.loads(record.read_text()) if done.returncode == 0 else {}, done.stdout + done.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("nvcc", "gpus", "archs"),
    [
        (NVCC_13, ["9.0"], ["90-real"]),
        (NVCC_13, ["12.0", "8.6", "12.0"], ["86-real", "120-real"]),
        # An unsupported GPU and a supported one.
        (NVCC_13, ["7.5", "8.0"], ["80-real"]),
        # Newer than nvcc: its driver compiles PTX.
        (NVCC_12_4, ["10.0"], ["90-virtual"]),
    ],
)
def test_the_gpus_of_this_machine_are_compiled_for(machine: Machine, nvcc: tuple, gpus: list, archs: list) -> None:
    machine.add_nvcc(*nvcc)
    machine.add_gpus(*gpus)
    record, _ = machine.decide()
    assert (record["cuda"], record["cuda_reason"], record["cuda_archs"]) == (True, None, archs)
    # With the list that is asked for, they don't matter.
    record, _ = machine.decide(EVAKERNELS_CUDA_ARCHS="86, 90-virtual")
    assert record["cuda_archs"] == ["86", "90-virtual"]


@pytest.mark.parametrize("nvcc", [NVCC_13, NVCC_12_8])
def test_unknown_gpu_gets_kernels_for_all(machine: Machine, nvcc: tuple) -> None:
    machine.add_nvcc(*nvcc)
    write_program(machine.programs / "nvidia-smi", {"-L": "GPU 0: NVIDIA H100"})
    record, _ = machine.decide()
    assert record["cuda_archs"] == ["80-real", "90-real", "100-real", "120"]
    assert record["cuda_codes"] == ["sm_80", "sm_90", "sm_100", "sm_120", "compute_100"]
    assert record["cuda_release"] == f"{nvcc[0]}.{nvcc[1]}"


@without_gpu
def test_kernels_without_a_gpu_are_optional(machine: Machine) -> None:
    machine.add_nvcc(*NVCC_13)
    record, _ = machine.decide()
    assert (record["cuda"], record["cuda_reason"], record["cuda_archs"]) == (False, NO_GPU, [])
    record, _ = machine.decide(EVAKERNELS_CUDA="on")
    assert (record["cuda"], record["cuda_archs"]) == (True, ["80-real", "90-real", "100-real", "120"])


def test_an_older_nvcc_compiles_for_what_it_knows(machine: Machine) -> None:
    machine.add_nvcc(*NVCC_12_4)
    record, printed = machine.decide(EVAKERNELS_CUDA="on", EVAKERNELS_CUDA_ARCHS="all")
    assert record["cuda_archs"] == ["80-real", "90"]
    assert "nvcc knows no compute capability 10.0, 12.0: PTX serves these" in printed


@pytest.mark.parametrize(
    ("nvcc", "gpus", "reason"),
    [
        (NVCC_13, ["7.5"], "the GPU's compute capability is 7.5; the kernels need 8.0 or later"),
        ((11, 8, (75, 80, 90)), ["9.0"], "nvcc 11.8 is too old; needed is 12.1 or later"),
        ((10, 0, ()), ["9.0"], "nvcc doesn't tell its version and the GPUs that it compiles for"),
    ],
)
def test_kernels_are_left_out_for_a_reason(machine: Machine, nvcc: tuple, gpus: list, reason: str) -> None:
    machine.add_nvcc(*nvcc)
    machine.add_gpus(*gpus)
    record, _ = machine.decide()
    assert (record["cuda"], record["cuda_reason"]) == (False, reason)


@pytest.mark.parametrize("archs", ["9.0", "91", "90-reel", "90;sm_80"])
def test_a_wrong_list_of_gpus_is_refused(machine: Machine, archs: str) -> None:
    machine.add_nvcc(*NVCC_12_4)
    record, printed = machine.decide(EVAKERNELS_CUDA="on", EVAKERNELS_CUDA_ARCHS=archs)
    assert not record
    assert "error: EVAKERNELS_CUDA_ARCHS must be all, or a list of 80, 86, 89, 90, each alone or" in printed
    assert f"(PTX only), got {archs.split(';')[-1]}" in printed
    assert "Traceback" not in printed
