"""The command line, run on a tiny operation."""

import runpy
import sys
from pathlib import Path

import pytest
from bench_fakes import machine, registered, row, tanh, tanh_operation
from torch import Tensor

from benchmarks import cli
from benchmarks import machine as machine_module
from benchmarks.audit import build
from benchmarks.results import Results, read_results

QUICK = ["--shape", "tiny b2", "--dtype", "float32", "--mode", "forward", "--passes", "1", "--seconds", "0.001"]

pytestmark = pytest.mark.usefixtures("steady")


def exit_code(arguments):
    try:
        return cli.main(arguments)
    except SystemExit as exc:
        return int(exc.code or 0)


def test_op_is_measured_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "new/run.json"), "--html", str(tmp_path / "run.html")]
    with registered(tanh_operation(), mine=tanh):
        assert cli.main(["op", "tanh", *QUICK, "--peer", "mine", *files]) == 0
    text = capsys.readouterr().out
    assert "torch eager" in text
    assert "mine" in text
    results = read_results(tmp_path / "new/run.json")
    assert results.rows[-1].candidate == "mine"
    assert results.machine.command.startswith("python -m benchmarks")
    assert (tmp_path / "run.html").is_file()


def test_op_is_measured_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # type: ignore[arg-type]
    for name in ("page", "plots"):
        monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    with registered(tanh_operation()):
        assert cli.main(["op", "tanh", *QUICK, "--peer", "none"]) == 0


def test_plugin_adds_a_candidate(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from benchmarks import peer\n\n@peer('tanh', 'mine')\ndef f(shape):\n    return lambda x: x.tanh()\n"
    )
    with registered(tanh_operation()):
        arguments = ["op", "tanh", *QUICK, "--plugin", str(plugin), "--peer", "mine"]
        assert cli.main([*arguments, "--json", str(tmp_path / "run.json")]) == 0
    assert read_results(tmp_path / "run.json").rows[-1].candidate == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["op", "tanhh"], "'tanhh'; did you mean 'tanh'"),
        (["model", "tanh"], "python -m benchmarks op tanh"),
        (["op", "tanh", "--shape", "tinyb2"], "did you mean 'tiny b2'?"),
        (["op", "layer_norm", "--shape", "8x0"], "rows x channels"),
        (["model", "dropin_frozen", "--device", "cuda"], "no GPU here"),
        (["op", "tanh", "--peer", "nobody"], "unknown peer 'nobody'"),
        (["op", "tanh", "--backend", "triton"], "unknown cpu backend 'triton'"),
        (["op", "tanh", "--passes", "0"], "--passes"),
        (["op", "tanh", "--seconds", "nan"], "--seconds"),
        (["op", "tanh", "--threads", "0"], "--threads"),
        (["op", "tanh", "--first", "-1"], "--first"),
        (["op", "tanh", "--plugin", "missing.py"], "got 'missing.py'"),
        (["op", "tanh", "--installed"], "--installed"),
        (["op", "tanh", "--page", "missing.md"], "missing.md"),
        (["op", "tanh", "--dtype", "float31"], "'float31'"),
        (["compare", "missing.json"], "missing.json"),
        (["audit", "nothing"], "'nothing'"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with registered(tanh_operation()):
        code = exit_code(arguments)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["op --json", "op --html", "op --profile"])
def test_unwritable_target_is_an_early_error(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine_module, "describe", None)  # what all of them begin with
    (tmp_path / "file").touch()
    verb, option = command.split()
    assert cli.main([verb, "layer_norm", option, str(tmp_path / "file" / "there")]) == 2
    assert f"{tmp_path}/file/there" in capsys.readouterr().err


def test_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    def interrupts_the_second_case(x: Tensor) -> Tensor:
        if len(x) == 4:
            raise KeyboardInterrupt
        return x.tanh()

    page = tmp_path / "page.md"
    page.write_text("<!-- benchmarks: begin -->whole<!-- benchmarks: end -->")
    run = ["--peer", "none", "--json", str(tmp_path / "run.json"), "--page", str(page)]
    with registered(tanh_operation(ours=interrupts_the_second_case)):
        assert cli.main(["op", "tanh", *QUICK, "--shape", "tiny b4", *run]) == 130
        results = read_results(tmp_path / "run.json")
        assert {row.shape for row in results.rows} == {"tiny@32 b2"}
        assert any(note.startswith("interrupted") for note in results.machine.notes)
        assert "whole" in page.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "from benchmarks import peer\n",
        "from benchmarks import peer\n\n@peer('tahn', 'a')\ndef f(shape):\n    ...\n",
        "from benchmarks import peer\n\n@peer('tanh', 'torch eager')\ndef f(shape):\n    ...\n",
        "def (:",
        "raise SystemExit(0)",
    ],
)
def test_plugin_without_a_peer_is_refused(text, tmp_path, capsys):
    plugin = tmp_path / "mine.py"
    plugin.write_text(text)
    with registered(tanh_operation()):
        assert cli.main(["op", "tanh", *QUICK, "--plugin", str(plugin)]) == 2
        assert cli.main(["op", "tanh", *QUICK, "--plugin", str(tmp_path / "mien.py")]) == 2
        assert f"did you mean {str(plugin)!r}?" in capsys.readouterr().err


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.01, 1), (float("nan"), 1)])
def test_check_refuses_wrong_results(factor: float, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with registered(tanh_operation(ours=lambda x: factor * x.tanh()), odd=lambda x: x.tanh()[:1]):
        assert exit_code(["op", "tanh", *QUICK, "--peer", "odd", "--check"]) == code
    text = capsys.readouterr().out
    assert ("tanh forward tiny@32 b2 float32 cpu evakernels: wrong: " in text) == bool(code)
    assert "peers that are wrong:\ntanh forward tiny@32 b2 float32 cpu odd: wrong: " in text


def kept(tmp_path: Path, name: str, results: Results) -> str:
    results.write_json(tmp_path / f"{name}.json")
    return str(tmp_path / f"{name}.json")


def test_compare_shows_one_result_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = kept(tmp_path, "run", Results(machine(), [row(), row(candidate="torch eager", kind="baseline")]))
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmarks: begin --><!-- benchmarks: end -->")
    assert cli.main(["compare", run, "--html", str(tmp_path / "run.html"), "--page", str(page)]) == 0
    assert "torch eager" in capsys.readouterr().out
    assert "| `layer_norm` |" in page.read_text()
    assert "Fake CPU" in (tmp_path / "run.html").read_text()
    assert cli.main(["compare", run, run, "--page", str(page)]) == 2


@pytest.mark.parametrize(("times", "code"), [([2.0] * 3, 0), ([3.0] * 3, 1)])
def test_compare_exit_code(tmp_path: Path, times: list[float], code: int) -> None:
    baseline = row(candidate="torch eager", kind="baseline", samples_ms=[[2.0] * 3] * 3)
    before, after = (
        kept(tmp_path, name, Results(machine(), [row(samples_ms=[samples] * 3), baseline]))
        for name, samples in (("before", [2.0] * 3), ("after", times))
    )
    assert exit_code(["compare", before, after]) == code


def test_compare_without_common_rows_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = row(candidate="torch eager", kind="baseline")
    files = [kept(tmp_path, op, Results(machine(), [baseline, row(op=op)])) for op in ("layer_norm", "gelu")]
    assert exit_code(["compare", *files]) == 2
    assert "after: gelu" in capsys.readouterr().err


def test_audit_names_all_missing_packages(monkeypatch, capsys):
    monkeypatch.setattr(build.budget(), "nvcc", lambda: None)
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    assert cli.main(["audit", "layer_norm"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install nvidia-cuda-nvcc nvidia-cuda-cccl triton" in line


def test_missing_import_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.cli")
    monkeypatch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match=r"pip install .* '\.\[bench\]'$"):
        runpy.run_module("benchmarks", run_name="__main__")
