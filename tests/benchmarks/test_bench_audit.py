"""The audit of GPU kernels but for the counting itself: what counts come to, and occupancy."""

import json
import shutil
import subprocess
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest

from benchmarks import cli
from benchmarks.audit import build
from benchmarks.audit.cases import list_cases
from benchmarks.audit.occupancy import SHARED, WARPS, occupancy, resident_warps
from benchmarks.audit.result import REST, Count, Launch, Traffic, count_from_json

KERNEL = "norm_add_forward<BFloat16, BFloat16, 8, 4>"
LAUNCH = Launch(
    kernel=KERNEL,
    grid=(3, 1, 1),
    block=(32, 4, 1),
    dynamic_bytes=0,
    barriers=2.0,
    shared_ways=1.25,
    worst_ways=2,
    loads={"x": Traffic(10, 5120, 160, 160), "weight": Traffic(20, 10240, 320, 32), REST: Traffic(1, 4, 1, 1)},
    stores={"out 0": Traffic(10, 2560, 160, 160)},
)
COUNT = Count(
    op="layer_norm",
    shape="eva02-l14@224 b1",
    dtype="bfloat16",
    direction="forward",
    floor=10240,
    memory=12288,
    sizes={"x": 5120, "weight": 1024, "out 0": 5120},
    launches=(LAUNCH,),
)


def test_large_buffers_count_each_time_and_small_ones_once() -> None:
    assert COUNT.streamed == {"x", "out 0"}
    assert COUNT.traffic == pytest.approx(32 * (160 + 160 + 32 + 1) / 10240)
    assert COUNT.touched == COUNT.traffic
    assert COUNT.past_cache == pytest.approx(1.2)
    assert COUNT.cached == pytest.approx(32 * (320 - 32) / 10240)
    twice = replace(LAUNCH, loads={"x": Traffic(20, 10240, 320, 160)})
    again = replace(COUNT, launches=(twice,))
    assert (again.traffic, again.touched) == (pytest.approx(1.5), pytest.approx(1.0))
    assert (COUNT.bytes_a_load, COUNT.bytes_a_store, COUNT.worst_ways) == (512, 256, 2)


def test_a_count_survives_json() -> None:
    assert count_from_json(json.loads(json.dumps(asdict(COUNT)))) == COUNT


def test_the_command_shows_that_it_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(build, "count_all", lambda cases: asked.extend(cases) or [COUNT])
    arguments = ["audit", "layer_norm", "--kernels", "cuda", "--dtype", "bfloat16", "--direction", "forward"]
    assert cli.main([*arguments, "--json", str(tmp_path / "audit.json")]) == 0
    assert asked == list_cases(["layer_norm"], [], ["bfloat16"], ["forward"])
    text = capsys.readouterr().out
    assert "predicted from counted accesses, not measured" in text
    assert "1.103" in text
    (stored,) = json.loads((tmp_path / "audit.json").read_text())["counts"]
    assert stored["shown"]["ways"] == "1.25 2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "layer_nrm"], "unknown audited operation 'layer_nrm'; did you mean 'layer_norm'"),
        (["audit", "layer_norm", "--shape", "x"], "unknown shape 'x'"),
    ],
)
def test_wrong_names(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_every_kernel_of_the_budget_has_its_occupancy() -> None:
    shares = occupancy(KERNEL, 128)
    assert set(shares) == set(SHARED)
    assert all(0 < share <= 1 for share in shares.values())
    assert occupancy("no such kernel", 128) == {}


def test_shared_memory_of_a_launch_leaves_room_for_fewer_blocks() -> None:
    # Two blocks of four warps, with what the system takes.
    half = SHARED["sm_90"] // 2 - 2048
    assert occupancy(KERNEL, 128, half)["sm_90"] == 2 * 4 / WARPS


PROGRAM = """
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int major, shared_of_multiprocessor, threads, registers, shared;
  while (std::scanf("%d %d %d %d %d", &major, &shared_of_multiprocessor, &threads, &registers, &shared) == 5) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = 0;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 2048;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = shared_of_multiprocessor;
    device.sharedMemPerBlockOptin = shared_of_multiprocessor - 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 100;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = shared;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_DEFAULT;
    kernel.maxDynamicSharedSizeBytes = 0;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, 0)) return 1;
    std::printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_the_formula_is_nvidias(tmp_path: Path) -> None:
    """NVIDIA's header computes the same, for many kernels."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or shutil.which("g++") is None:
        pytest.skip("no CUDA toolkit, which has the header")
    header = tmp_path / "where.cu"
    header.write_text("#include <cuda_occupancy.h>\n")
    listing = subprocess.run([nvcc, "-M", header], capture_output=True, text=True, check=True).stdout
    found = next(word for word in listing.split() if word.endswith("cuda_occupancy.h"))
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(PROGRAM)
    subprocess.run(["g++", "-I", Path(found).parent, source, "-o", program], check=True)
    cases = list(
        product(
            SHARED,
            (32, 64, 96, 128, 160, 192, 256, 384, 1024),
            (16, 40, 63, 64, 65, 96, 128, 168, 255),
            (0, 1000, 9000, 40000),
        )
    )
    majors = {"sm_80": 8, "sm_90": 9, "sm_100": 10}
    lines = [f"{majors[arch]} {SHARED[arch]} {' '.join(map(str, numbers))}" for arch, *numbers in cases]
    answer = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    expected = [int(blocks) * numbers[0] // 32 for blocks, (_, *numbers) in zip(answer.split(), cases, strict=True)]
    ours = [resident_warps(*case) for case in cases]
    assert [(c, a, b) for c, a, b in zip(cases, ours, expected, strict=True) if a != b] == []
    assert max(ours) == WARPS
