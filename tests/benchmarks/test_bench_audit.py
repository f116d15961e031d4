"""The audit of GPU kernels without the counting itself: ratios, pipes, and the command."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks import cli
from benchmarks.audit import build
from benchmarks.audit.cases import list_cases
from benchmarks.audit.count import spans_of
from benchmarks.audit.pipes import flops_of, instructions_of, pipe_of
from benchmarks.audit.result import REST, Count, Launch, Line
from benchmarks.audit.table import costly_lines
from ptx_interpreter import Traffic
from ptx_interpreter.body import Instruction
from ptx_interpreter.traffic import Requests

LINE = Line(
    "norm.cu:7", Counter(alu=4000, memory=41, moves=10**9), 0, Traffic(41, 650), Traffic(10, 25, least=20, worst=2)
)
OTHER = Line("rows.h:3", Counter(alu=500, tensor=2), 2 * 4096)
LAUNCH = Launch(
    kernel="norm_add_forward", barriers=2.0, lines=(OTHER, LINE),
    loads={"x": Requests(10, 5120, 160, 160), "weight": Requests(20, 10240, 320, 32), REST: Requests(1, 4, 1, 1)},
    stores={"out 0": Requests(10, 2560, 160, 160)},
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
    twice = replace(LAUNCH, loads={"x": Requests(20, 10240, 320, 160)})
    again = replace(COUNT, launches=(twice,))
    assert (again.traffic, again.touched) == (pytest.approx(1.5), pytest.approx(1.0))
    assert (COUNT.request_bytes("loads"), COUNT.request_bytes("stores"), COUNT.worst_ways) == (512, 256, 2)


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


def test_costly_lines_leave_moves_out() -> None:
    assert [line.place for line in costly_lines(COUNT)] == ["norm.cu:7", "rows.h:3"]
    moves = replace(COUNT, launches=(replace(LAUNCH, lines=(Line("a.h:1", Counter(moves=10**9)), OTHER)),))
    assert [line.place for line in costly_lines(moves, most=1)] == ["rows.h:3"]


def test_tensors_that_share_memory_are_one_buffer() -> None:
    packed, alone = torch.zeros(4, 3, 8), torch.zeros(5)
    q, k, _ = packed.unbind(1)
    spans = spans_of({"q": [q], "k": [k], "x": [alone, torch.zeros(0)], "d x": [alone]})
    start = packed.data_ptr()
    assert spans == {"q, k": [(start, start + packed.nbytes)], "x": [(alone.data_ptr(), alone.data_ptr() + 20)]}


def test_audit_lists_calls_with_kernels() -> None:
    float32 = {op for op, _, dtype, _ in list_cases() if dtype == "float32"}
    assert {"layer_norm", "gelu"} <= float32
    assert not any("loss" in op or "attention" in op for op in float32)
    assert {direction for *_, direction in list_cases(["siglip_loss"])} == {"forward"}


def test_audit_command_without_kernels_fails(capsys) -> None:
    assert cli.main(["audit", "siglip_loss", "--kernels", "cuda", "--dtype", "float32"]) == 2
    assert "no audited kernels" in capsys.readouterr().err


def test_audit_command_counts_and_explains(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # names are broken in a narrow table
    asked = []
    monkeypatch.setattr(build, "require", lambda kinds: None)
    monkeypatch.setattr(build, "count_all", lambda *arguments: asked.append(arguments) or [COUNT])
    arguments = ["audit", "layer_norm", "--kernels", "cuda", "--dtype", "bfloat16", "--arch", "sm_80"]
    assert cli.main(arguments) == 0
    assert asked == [(list_cases(["layer_norm"], [], ["bfloat16"]), "sm_80", "cuda")]
    text = capsys.readouterr().out
    assert "not measured" in text
    assert "1.103" in text
    assert "norm.cu:7" not in text
    assert cli.main([*arguments, "--explain"]) == 0
    assert "norm.cu:7" in capsys.readouterr().out
