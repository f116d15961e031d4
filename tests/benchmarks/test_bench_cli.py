"""The command line, run on a tiny operation."""

import runpy
import sys
from pathlib import Path

import pytest
from bench_fakes import machine, registered, row, tanh, tanh_operation
from torch import Tensor

from benchmarks import cli, table
from benchmarks import machine as machine_module
from benchmarks.operation import operations, peers_of
from benchmarks.results import Results, read_results

QUICK = ["--shape", "tiny b2", "--dtype", "float32", "--mode", "forward", "--passes", "1", "--seconds", "0.001"]

pytestmark = pytest.mark.usefixtures("steady")


def exit_code(arguments):
    try:
        return cli.main(arguments)
    except SystemExit as exc:
        return int(exc.code or 0)


def test_an_operation_is_measured_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "run.json"), "--plot", str(tmp_path / "report")]
    with registered(tanh_operation(), mine=tanh):
        assert cli.main(["op", "tanh", *QUICK, "--peer", "mine", *files]) == 0
    text = capsys.readouterr().out
    assert "torch eager" in text
    assert "mine" in text
    results = read_results(tmp_path / "run.json")
    assert results.rows[-1].candidate == "mine"
    assert results.machine.command.startswith("python -m benchmarks")
    assert (tmp_path / "report" / "index.html").is_file()


def test_everything_is_what_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(tanh_operation(name="one")), registered(tanh_operation(name="two")):
        monkeypatch.setattr(cli, "suite_operations", lambda: [operations()[name] for name in ("one", "two")])
        assert cli.main(["all", *QUICK, "--peer", "none", "--json", str(tmp_path / "run.json")]) == 0
    assert {row.op for row in read_results(tmp_path / "run.json").rows} == {"one", "two"}


def test_a_file_of_ones_own_adds_a_candidate(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from benchmarks import peer\n\n@peer('tanh', 'mine')\ndef build(shape):\n    return lambda x: x.tanh()\n"
    )
    with registered(tanh_operation()):
        arguments = ["op", "tanh", *QUICK, "--plugin", str(plugin), "--peer", "mine"]
        assert cli.main([*arguments, "--json", str(tmp_path / "run.json")]) == 0
        assert [peer.name for peer in peers_of("tanh")] == ["mine"]
    assert read_results(tmp_path / "run.json").rows[-1].candidate == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["op", "tanhh"], "unknown operation 'tanhh'; did you mean 'tanh'"),
        (["model", "tanh"], "unknown model operation 'tanh'; known: clip_step, encode_image, encode_text"),
        (["op", "tanh", "--shape", "x"], "unknown shape 'x'"),
        (["op", "tanh", "--peer", "nobody"], "unknown peer 'nobody'"),
        (["op", "tanh", "--passes", "0"], "--passes must be at least 1"),
        (["op", "tanh", "--seconds", "nan"], "argument --seconds: must be a number above 0, got 'nan'"),
        (["op", "tanh", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["op", "tanh", "--shape", "tiny@32 2"], "unknown shape 'tiny@32 2'"),
        (["op", "tanh", "--shape", "tinyb2"], "did you mean 'tiny b2'?"),
        (["op", "tanh", "--shape", "4x8"], "shape '4x8': tanh needs more than sizes; expected a name"),
        (["op", "layer_norm", "--shape", "8"], "shape '8': layer_norm has 2 sizes of 1 or more, rows x channels"),
        (["op", "layer_norm", "--shape", "8x0"], "layer_norm has 2 sizes of 1 or more, rows x channels"),
        (["metadata", "--ranks", "2", "0"], "--ranks and --shards are 1 or more, got 0 and 160000"),
        (["audit", "nothing"], "known: adamw_step, add_layer_norm, "),
        (["op", "tanh", "--plugin", "missing.py"], "--plugin 'missing.py' isn't a Python file"),
        (["op", "tanh", "--first", "-1"], "--first must be 0, for all, or more, got -1"),
        (["op", "tanh", "--installed"], "--installed: no evakernels is installed for"),
        (["op", "tanh", "--page", "missing.md"], "can't read missing.md"),
        (["report", "missing.json"], "--out FOLDER or --page FILE is missing"),
        (["op", "tanh", "--dtype", "float31"], "unknown choice 'float31'"),
        (["compare", "missing.json", "missing.json"], "can't read missing.json"),
        (["report", "missing.json", "--out", "x"], "can't read missing.json"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with registered(tanh_operation()):
        code = exit_code(arguments)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "command", ["op --json", "op --plot", "op --profile", "infer --json", "data --json", "data --plot", "audit --json"]
)
def test_where_nothing_can_be_written_is_told_before_the_work(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine_module, "describe", None)  # what all of them begin with
    (tmp_path / "file").touch()
    verb, option = command.split()
    names = ["layer_norm"] if verb == "op" else []
    assert cli.main([verb, *names, option, str(tmp_path / "file" / "there")]) == 2
    assert f"cannot write {tmp_path}/file/there" in capsys.readouterr().err


def test_what_was_measured_before_ctrl_c_is_kept(tmp_path: Path) -> None:
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
        assert "interrupted: 1 of 2 measurements were made" in results.machine.notes
        assert "whole" in page.read_text()
        (tmp_path / "run.json").unlink()
        assert cli.main(["op", "tanh", *QUICK[2:], "--shape", "tiny b4", *run]) == 130
    assert not (tmp_path / "run.json").exists()


def test_a_reader_that_is_gone_loses_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "print_table", gone)
    with registered(tanh_operation()), pytest.raises(BrokenPipeError):
        cli.main(["op", "tanh", *QUICK, "--peer", "none", "--json", str(tmp_path / "run.json"), "--debug"])
    assert len(read_results(tmp_path / "run.json").rows) == 3


def gone(*args: object) -> None:
    raise BrokenPipeError


def test_a_result_makes_its_folder(tmp_path: Path) -> None:
    with registered(tanh_operation()):
        assert cli.main(["op", "tanh", *QUICK, "--peer", "none", "--json", str(tmp_path / "new" / "run.json")]) == 0
    assert (tmp_path / "new" / "run.json").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from benchmarks import peer\n", "registers nothing; it needs a @peer(OPERATION, NAME)"),
        ("from benchmarks import peer\n\n@peer('tahn', 'a')\ndef f(shape):\n    ...\n", "did you mean 'tanh'"),
        ("from benchmarks import peer\n\n@peer('tanh', 'torch eager')\ndef f(shape):\n    ...\n", "two candidates"),
        ("def (:", "mine.py' ends with SyntaxError: "),
        ("import not_there", "mine.py' ends with ModuleNotFoundError: No module named 'not_there'"),
        ("raise SystemExit(0)", "mine.py' ends with SystemExit: 0"),
    ],
)
def test_a_plugin_that_adds_nothing_measurable_is_told(text, message, tmp_path, capsys):
    plugin = tmp_path / "mine.py"
    plugin.write_text(text)
    with registered(tanh_operation()):
        assert cli.main(["op", "tanh", *QUICK, "--plugin", str(plugin)]) == 2
        assert message in capsys.readouterr().err
        assert cli.main(["op", "tanh", *QUICK, "--plugin", str(tmp_path / "mien.py")]) == 2
        assert f"did you mean {str(plugin)!r}?" in capsys.readouterr().err


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.01, 1), (float("nan"), 1)])
def test_check_refuses_what_is_inexact(factor: float, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with registered(tanh_operation(ours=lambda x: factor * x.tanh())):
        assert exit_code(["op", "tanh", *QUICK, "--peer", "none", "--check"]) == code
    assert ("tanh forward tiny@32 b2 float32 cpu evakernels: wrong: " in capsys.readouterr().out) == bool(code)


def test_check_names_wrong_peers_and_lets_them_pass(capsys: pytest.CaptureFixture[str]) -> None:
    with registered(tanh_operation(), odd=lambda x: x.tanh()[:1]):
        assert cli.main(["op", "tanh", *QUICK, "--peer", "odd", "--check"]) == 0
    text = capsys.readouterr().out
    assert "peers that are wrong:\ntanh forward tiny@32 b2 float32 cpu odd: wrong: shape (1, 128) came back" in text


def test_sizes_alone_make_a_shape(tmp_path: Path) -> None:
    quick = [*QUICK[2:], "--peer", "none", "--json", str(tmp_path / "run.json"), "--page", str(tmp_path / "page.md")]
    (tmp_path / "page.md").write_text("<!-- benchmarks: begin --><!-- benchmarks: end -->")
    assert cli.main(["op", "layer_norm", "gelu", "--shape", "4x8", "--shape", "64x96", *quick]) == 0
    rows = read_results(tmp_path / "run.json").rows
    assert {(row.op, row.shape) for row in rows} == {
        (op, of) for op in ("layer_norm", "gelu") for of in ("4x8", "64x96")
    }
    assert all(row.failure is None for row in rows)
    assert "| `gelu` | 64x96 | float32 |" in (tmp_path / "page.md").read_text()


def test_report_reads_what_was_kept(tmp_path: Path) -> None:
    Results(machine(), [row(), row(candidate="torch eager", kind="baseline")]).write_json(tmp_path / "run.json")
    assert cli.main(["report", str(tmp_path / "run.json"), "--out", str(tmp_path / "pages")]) == 0
    assert (tmp_path / "pages" / "index.html").is_file()
    both = [str(tmp_path / "run.json")] * 2
    assert cli.main(["report", *both, "--out", str(tmp_path / "beside")]) == 0
    assert "1: run and 2: run" in (tmp_path / "beside" / "index.html").read_text()
    for results in (both, both[:1]):
        assert cli.main(["report", *results, "--out", both[0]]) == 2


@pytest.mark.parametrize(("times", "code"), [([2.0] * 3, 0), ([3.0] * 3, 1)])
def test_compare_tells_by_its_exit_code(tmp_path: Path, times: list[float], code: int) -> None:
    baseline = row(candidate="torch eager", kind="baseline", samples_ms=[[2.0] * 3] * 3)
    for name, samples in (("before", [2.0] * 3), ("after", times)):
        Results(machine(), [row(samples_ms=[samples] * 3), baseline]).write_json(tmp_path / f"{name}.json")
    assert exit_code(["compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")]) == code


def test_compare_without_common_rows_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = row(candidate="torch eager", kind="baseline")
    for name, op in (("before", "layer_norm"), ("after", "gelu")):
        Results(machine(), [baseline, row(op=op)]).write_json(tmp_path / f"{name}.json")
    assert exit_code(["compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")]) == 2
    told = capsys.readouterr().err
    assert "before: layer_norm" in told
    assert "after: gelu" in told


def test_list_shows_operations_and_who_is_absent(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for part in ("layer_norm", "rope_attention", "clip_step", "eva02-b16@224 b1", "runs on cuda only"):
        assert part in text


def test_without_what_they_import_the_extra_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.cli")
    monkeypatch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match=r"^error: .*torch.*; .* pip install .* '\.\[bench\]'$"):
        runpy.run_module("benchmarks", run_name="__main__")
