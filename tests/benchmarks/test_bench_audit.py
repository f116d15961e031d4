"""The audit of GPU kernels without the counting itself: its cases and the command."""

from collections import Counter

from benchmarks import cli
from benchmarks.audit import build
from benchmarks.audit.cases import list_cases
from benchmarks.audit.result import REST, Count, Launch, Line
from ptx_interpreter import Traffic
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
