"""The audit of GPU kernels but for the counting itself: what counts come to, the roofline, and occupancy."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import cli
from benchmarks.audit import build
from benchmarks.audit.cases import list_cases
from benchmarks.audit.count import spans_of
from benchmarks.audit.result import REST, Count, Launch, Line, Shared, Traffic
from benchmarks.audit.roofline import (
    SHARED,
    WARPS,
    flops_of,
    instructions_of,
    limiter,
    occupancy,
    pipe_of,
    resident_warps,
    share_of_floor,
    times,
)
from benchmarks.audit.table import costly_lines
from ptx_interpreter.body import Instruction

KERNEL = "norm_add_forward<BFloat16, BFloat16, 8, 4>"
LINE = Line("norm.cu:7", {"alu": 4000, "memory": 41, "moves": 10**9}, 0, Shared(10, 25, 20, 2), 41, 650)
OTHER = Line("rows.h:3", {"alu": 500, "tensor": 2}, 2 * 4096, Shared(), 0, 0)
LAUNCH = Launch(
    kernel=KERNEL, grid=(3, 1, 1), block=(32, 4, 1), dynamic_bytes=0, barriers=2.0,
    lines=(OTHER, LINE),
    loads={"x": Traffic(10, 5120, 160, 160), "weight": Traffic(20, 10240, 320, 32), REST: Traffic(1, 4, 1, 1)},
    stores={"out 0": Traffic(10, 2560, 160, 160)},
)  # fmt: skip
COUNT = Count(
    kernels="cuda", arch="sm_80", op="layer_norm", shape="eva02-l14@224 b1", dtype="bfloat16", direction="forward",
    floor=10240, sizes={"x": 5120, "weight": 1024, "out 0": 5120}, launches=(LAUNCH,),
)  # fmt: skip


def test_small_buffers_count_once() -> None:
    assert COUNT.streamed == {"x", "out 0"}
    assert COUNT.traffic == pytest.approx(32 * (160 + 160 + 32 + 1) / 10240)
    assert COUNT.touched == COUNT.traffic
    assert COUNT.cached == pytest.approx(32 * (320 - 32) / 10240)
    twice = replace(LAUNCH, loads={"x": Traffic(20, 10240, 320, 160)})
    again = replace(COUNT, launches=(twice,))
    assert (again.traffic, again.touched) == (pytest.approx(1.5), pytest.approx(1.0))
    assert (COUNT.bytes_a_load, COUNT.bytes_a_store, COUNT.worst_ways) == (512, 256, 2)


PIPES = [
    ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2}, {%r1}, {%r2}, {%f1, %f2};", "mma.sync", 1, 4096),
    ("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%f1}, %d1, %d2, %p1, 1, 1, 0, 0;", "tensor", 1, 16384),
    ("wgmma.commit_group.sync.aligned;", "control", 1, 0),
    ("fma.rn.f32 %f1, %f2, %f3, %f4;", "fma", 1, 0),
    ("mul.f32 %f1, %f2, %f3;", "fma", 1, 0),
    ("max.f32 %f1, %f2, %f3;", "alu", 1, 0),
    ("mad.lo.s32 %r1, %r2, %r3, %r4;", "alu", 1, 0),
    ("add.s64 %d1, %d2, %d3;", "alu", 2, 0),
    ("ex2.approx.ftz.f32 %f1, %f2;", "sfu", 1, 0),
    ("cvt.rn.bf16.f32 %h1, %f1;", "alu", 1, 0),
    ("cvt.u64.u32 %d1, %r1;", "moves", 1, 0),
    ("mov.b32 %r1, %r2;", "moves", 1, 0),
    ("ld.param.u64 %d1, [p0];", "moves", 1, 0),
    ("ld.global.v4.u64 {%d1}, [%d2];", "memory", 1, 0),
    ("shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;", "memory", 1, 0),
    ("cp.async.wait_group 0;", "control", 1, 0),
    ("bar.sync 0;", "control", 1, 0),
]


@pytest.mark.parametrize(("text", "pipe", "instructions", "flops"), PIPES, ids=[row[0].split()[0] for row in PIPES])
def test_instructions_go_to_pipes(text: str, pipe: str, instructions: int, flops: int) -> None:
    op, *mods = text.split()[0].rstrip(";").split(".")
    instruction = Instruction(op, tuple(mods), [], None, False, text, (0, 0))
    found = pipe_of(instruction), instructions_of(instruction), flops_of(instruction)
    assert found == (pipe, instructions, flops)


def test_the_slowest_part_limits() -> None:
    """An A100: 108 multiprocessors, of which each takes two instructions of a warp a cycle for integers."""
    clocks = 19.5e12 / 128
    found = times("sm_80", LAUNCH)
    assert found["alu"] == pytest.approx(4500 / 2 / clocks)
    assert found["issue"] == pytest.approx((4500 + 41 + 2) / 4 / clocks)
    assert found["tensor"] == pytest.approx(2 * 4096 / 312e12)
    # 25 cycles of shared memory; 650 sectors are as many cycles as lines of 128 bytes.
    assert found["memory"] == pytest.approx((25 + 650 / 4) / clocks)
    assert found["DRAM"] == pytest.approx(32 * (160 + 160 + 32 + 1) / 2039e9)
    assert limiter("sm_80", LAUNCH) == "alu"
    assert share_of_floor(COUNT) == pytest.approx(10240 / 2039e9 / found["alu"])
    assert times("sm_90", LAUNCH)["memory"] < found["memory"]
    of_warps = replace(LAUNCH, lines=(replace(OTHER, warps={"mma.sync": 2}), LINE))
    assert times("sm_90", of_warps)["tensor"] == pytest.approx(times("sm_90", LAUNCH)["tensor"] / 0.62)
    assert [line.place for line in costly_lines(COUNT)] == ["norm.cu:7", "rows.h:3"]


def test_tensors_that_share_memory_are_one_buffer() -> None:
    packed, alone = torch.zeros(4, 3, 8), torch.zeros(5)
    q, k, _ = packed.unbind(1)
    spans = spans_of({"q": [q], "k": [k], "x": [alone, torch.zeros(0)], "d x": [alone]})
    start = packed.data_ptr()
    assert spans == {"q, k": [(start, start + packed.nbytes)], "x": [(alone.data_ptr(), alone.data_ptr() + 20)]}


def test_the_command_shows_that_it_predicts(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # names are broken in a narrow table
    asked = []
    monkeypatch.setattr(build, "require", lambda kinds: None)
    monkeypatch.setattr(build, "count_all", lambda *arguments: asked.append(arguments) or [COUNT])
    arguments = ["audit", "layer_norm", "--kernels", "cuda", "--dtype", "bfloat16"]
    arguments += ["--arch", "sm_80", "--json", str(tmp_path / "audit.json")]
    assert cli.main(arguments) == 0
    assert asked == [(list_cases(["layer_norm"], [], ["bfloat16"]), "sm_80", "cuda")]
    text = capsys.readouterr().out
    assert "predicted from counted instructions, not measured" in text
    assert "1.103" in text
    assert "norm.cu:7" not in text
    (stored,) = json.loads((tmp_path / "audit.json").read_text())["counts"]
    assert stored["shown"]["ways"] == "1.25 2"
    assert stored["limiters"] == ["alu"]
    assert cli.main([*arguments, "--explain"]) == 0
    assert "norm.cu:7" in capsys.readouterr().out


def test_dynamic_shared_memory_limits_occupancy() -> None:
    # Two blocks of four warps, with what the system takes.
    half = SHARED["sm_90"] // 2 - 2048
    assert occupancy(KERNEL, 128, half)["sm_90"] == 2 * 4 / WARPS


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "warps"),
    [
        ("sm_80", 32, 16, 0, 32),  # as many blocks as there may be
        ("sm_80", 128, 64, 0, 32),  # registers
        ("sm_80", 128, 41, 0, 40),  # which come in units
        ("sm_80", 96, 40, 0, 48),  # to each quarter
        ("sm_80", 1024, 96, 0, 0),
        ("sm_90", 160, 63, 9000, 30),
        ("sm_90", 96, 96, 40_000, 15),  # shared memory
        ("sm_90", 128, 32, 14_468, 56),  # which comes in units, too
        ("sm_100", 256, 128, 1000, 16),
    ],
)
def test_the_formula_is_nvidias(arch: str, threads: int, registers: int, shared: int, warps: int) -> None:
    """The answers of cudaOccMaxActiveBlocksPerMultiprocessor in CUDA's header."""
    assert resident_warps(arch, threads, registers, shared) == warps
