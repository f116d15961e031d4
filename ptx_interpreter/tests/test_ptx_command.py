"""The command runs a file's Triton kernels and finds what was planted in them, at the right line."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

FILE = Path(__file__).with_name("planted_kernels.py")
ROOT = Path(__file__).parents[2]


def check(*kernels, capability=80, file=FILE):
    from ptx_interpreter.__main__ import Checker, run_file

    checker = Checker(capability)
    run_file(checker, str(file), kernels)
    return checker


@pytest.mark.parametrize("capability", [80, 90])
def test_checker_right_kernels_have_no_findings(capability):
    checker = check("right", "differentiated", "tuned", "locked", "counted", "rows_off", capability=capability)
    assert not checker.findings
    assert checker.kernels == {"right": 3, "tuned": 1, "locked": 1, "counted": 1, "rows_off": 1}


SIZES = """
import torch
gpu = torch.cuda.get_device_properties(0)
print(gpu.multi_processor_count, gpu.L2_cache_size >> 20, gpu.shared_memory_per_block_optin >> 10, gpu.major)
"""


@pytest.mark.parametrize(
    ("options", "sizes"),
    [([], "108 40 163 8"), (["--sm", "90", "--gpu", "b200"], "148 126 227 9"), (["--gpu", "h100"], "132 50 227 8")],
)
def test_command_shows_the_sizes_of_a_gpu(options, sizes, tmp_path):
    (tmp_path / "sizes.py").write_text(SIZES)
    command = [sys.executable, "-m", "ptx_interpreter", *options, str(tmp_path / "sizes.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stdout.startswith(sizes + "\n"), done.stderr
    assert done.returncode == 3, "no kernel was launched"


def test_checker_runs_tensor_descriptors():
    assert not check("described").findings


@pytest.mark.parametrize(
    "name",
    [
        *("one_address", "one_place", "no_barrier", "no_mask", "before", "no_other", "no_other_bf16", "wrong_mask"),
        *("unwritten", "wrong_hint", "uneven"),
    ],
)
def test_checker_names_the_planted_line(name):
    lines = FILE.read_text().splitlines()
    function = "write" if name == "wrong_mask" else name
    start = next(n for n, line in enumerate(lines) if line.startswith(f"def {function}("))
    number = next(n for n in range(start, len(lines)) if "  # " in lines[n])
    finding = next(iter(check(name).findings.values()))
    assert (finding.kernel, finding.kind) == (name, lines[number].partition("  # ")[2])
    assert finding.place == (str(FILE), number + 1)
    assert name != "unwritten" or finding.accesses == 64
    assert name != "before" or "4 bytes before x (4000 bytes)" in finding.first.detail
    callers = {lines[line - 1].strip()[:5] for _, line in finding.callers}  # Triton 3.6 names none
    assert callers <= ({"write"} if name == "wrong_mask" else set())


@pytest.mark.parametrize("checkout", ["first", "second"])
def test_checker_names_the_file_of_its_checkout(tmp_path, checkout):
    """Though a file with the same kernels in another folder was checked before."""
    file = tmp_path / checkout / FILE.name
    file.parent.mkdir()
    shutil.copy(FILE, file)
    (finding,) = check("no_mask", file=file).findings.values()
    assert finding.place[0] == str(file)


def test_command_reports_lines_and_the_unknown():
    command = [sys.executable, "-m", "ptx_interpreter", "--multiprocessors", "7", str(FILE), "no_mask", "unknown"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert "out of bounds in no_mask" in done.stdout
    assert "szext.wrap.b32" in done.stdout
    assert "line" in done.stdout.partition("szext")[2]
