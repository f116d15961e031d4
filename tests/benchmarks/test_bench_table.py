"""What the terminal shows."""

import pytest
from bench_fakes import machine, registered, row, tanh, tanh_operation
from bench_report_fakes import SHAPES, contest, results

from benchmarks.columns import mebibytes, percent, scientific, significant
from benchmarks.operation import peer
from benchmarks.results import Results
from benchmarks.shapes import Shape
from benchmarks.table import PIPED_WIDTH, print_operations, print_table


@pytest.fixture(autouse=True)
def piped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tests' own terminal is."""
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def shown(capsys: pytest.CaptureFixture[str], what: Results) -> str:
    print_table(what)
    return capsys.readouterr().out


def cells(text: str, candidate: str) -> str:
    """The cells of the first row of a candidate, a space between them."""
    line = next(line for line in text.splitlines() if line.startswith(f"  {candidate} "))
    return " ".join(line.removeprefix(f"  {candidate}").split())


def test_a_row_shows_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, Results(machine(), contest("rope_attention", SHAPES[1], "float32", "training")))
    assert "rope_attention · training · float32" in text
    assert f"\n{SHAPES[1]} " in text
    assert cells(text, "torch.compile") == "0.960 0.912 1.01 0.417 0.00821 31 % 1.25 3.20 2.00 8.0e-07 0.800 123"
    assert " 25 % 1.00 " in cells(text, "torch eager")


def test_the_first_table_is_ours_against_the_best_peer(capsys: pytest.CaptureFixture[str]) -> None:
    one = contest("layer_norm", SHAPES[0], "float32", "forward")
    wrong = row(shape=SHAPES[0], candidate="odd", kind="peer", samples_ms=[], failure="wrong: NaN among the outputs")
    text = shown(capsys, Results(machine(), [*one, wrong]))
    assert text.count("ours against the best peer") == 1
    line = next(line for line in text.splitlines() if line.startswith("layer_norm "))
    numbers = "0.0500 cpu 0.0800 torch.compile 1.60 ×"  # noqa: RUF001
    assert " ".join(line.split()) == f"layer_norm forward {SHAPES[0]} float32 {numbers}"
    assert text.index(line) < text.index("layer_norm · forward · float32")
    assert cells(text, "odd").startswith("wrong – –")  # noqa: RUF001
    assert f"odd, {SHAPES[0]}: wrong: NaN among the outputs" in text


def test_there_is_one_table_for_each_operation_mode_and_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, results())
    titles = [line for line in text.splitlines() if line.endswith((" · float32", " · bfloat16"))]
    assert len(titles) == len(set(titles)) == 8
    assert text.count("shape, candidate") == 8
    assert [line.strip() for line in text.splitlines() if line.strip() in SHAPES] == list(SHAPES) * 8


def test_the_machine_stands_above_and_its_doubts_above_and_below(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, results())
    head, _, _ = text.partition("layer_norm")
    for expected in ("Fake CPU", "copy 10.0 GB/s", "float32 matmul 0.100 TFLOP/s", "commit abcdef123456", "torch 2.99"):
        assert expected in head
    assert "2026-01-02" in head
    assert "python -m benchmarks all" in head
    assert text.count("! busy: other processes used 40% of the processors during the run") == 2
    assert text.rstrip().endswith("absent: far <away>, runs on cuda only")


def test_a_pipe_gets_plain_text_of_120_columns_that_hold_everything(capsys: pytest.CaptureFixture[str]) -> None:
    long = contest("rope_attention", SHAPES[2], "bfloat16", "training")
    for one in long:
        one.shape = "eva02-bige14@224 b128 drop50"
        one.samples_ms = [[1234.5, 1234.5]]
        one.failure = None
    text = shown(capsys, Results(machine(), long))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= PIPED_WIDTH == 120
    assert "…" not in text
    assert "eva02-bige14@224 b128 drop50" in text
    assert len(cells(text, "torch eager").split()) >= 9


def test_a_narrow_terminal_gets_the_important_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, Results(machine(), contest("rope_attention", SHAPES[1], "float32", "training")))
    assert cells(text, "torch.compile") == "0.960 0.00821 31 % 1.25 3.20 2.00 8.0e-07"
    assert max(map(len, text.splitlines())) <= 80


def test_operations_are_listed_with_who_is_there_and_who_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with registered(tanh_operation(), mine=tanh):
        peer("tanh", "elsewhere", devices=("cuda",))(lambda shape: tanh)
        print_operations([tanh_operation()], "cpu")
    text = capsys.readouterr().out
    assert "tanh  hyperbolic tangent  (forward, training)" in text
    assert "  inputs      (x: torch.Tensor) -> torch.Tensor" in text
    assert "  shapes      tiny b2" in text
    assert "sizes" not in text
    print_operations([tanh_operation(raw=lambda rows, channels: Shape(batch=rows, width=channels))], "cpu")
    assert "  sizes       rows x channels, such as --shape 64x64" in capsys.readouterr().out
    assert "  candidates  evakernels, evakernels reference, torch eager, torch.compile, mine" in text
    assert "elsewhere: runs on cuda only" in text


def test_numbers_have_three_digits_and_no_needless_exponent() -> None:
    given = (0, 0.000123, 0.0123456, 0.9999, 1.2, 99.96, 1234.5, 1234567, float("nan"))
    texts = ["0", "0.000123", "0.0123", "1.00", "1.20", "100", "1,230", "1,230,000", "nan"]
    assert [significant(value) for value in given] == texts
    assert [mebibytes(size) for size in (0, 1000, 3 << 19, 1 << 30)] == ["0", "<0.01", "1.50", "1,020"]
    assert [percent(share) for share in (0.001, 0.056, 0.1, 1.234)] == ["0.10 %", "5.6 %", "10 %", "123 %"]
    assert [scientific(value) for value in (0.0, 1.26e-7, float("nan"))] == ["0", "1.3e-07", "nan"]


def test_a_case_without_plain_pytorch_has_no_speedup(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, Results(machine(), [row()]))
    assert "eager" not in text
    assert cells(text, "evakernels cpu") == "2.00 2.00 2.10 5.00 50 %"
