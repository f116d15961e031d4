"""The pages, the picture and the Markdown table, against the rows that they were made from."""

import re
from pathlib import Path

import pytest
from bench_fakes import machine, row
from bench_report_fakes import FAILURE, SHAPES, SPEEDS, contest, results
from html_page import Page
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.columns import LEVEL, time_text, verdict_text
from benchmarks.contests import contests, verdict
from benchmarks.report.beside import write_beside
from benchmarks.report.drawing import COLOURS
from benchmarks.report.markdown import write_section
from benchmarks.report.overview import draw_roofline
from benchmarks.report.page import write_report
from benchmarks.report.speedups import speedups
from benchmarks.report.tables import page_name
from benchmarks.results import Results
from evaclip.errors import UserError

pytestmark = pytest.mark.xdist_group("report")

PAGES = ("index.html", "layer_norm.html", "rope_attention.html")
CASES = 2 * 4 * 2 * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("report") / "pages"
    assert write_report(results(), where) == where / "index.html"
    return where


def read(folder: Path, name: str) -> Page:
    return Page((folder / name).read_text(encoding="utf-8"))


def test_nothing_is_missing_and_nothing_left_over(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {*PAGES, "roofline.png"}
    with Image.open(folder / "roofline.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width == 1650


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_whole_and_need_nothing_from_outside(folder: Path, name: str) -> None:
    text = (folder / name).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.addresses
    for address in page.addresses:
        assert address.startswith("#") or (folder / address).is_file(), address
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r"<(link|iframe|img)\b", text)
    assert len(set(page.plots)) == len(page.plots) > 0


@pytest.mark.parametrize("name", PAGES)
def test_plots_follow_the_theme(folder: Path, name: str) -> None:
    text = (folder / name).read_text(encoding="utf-8")
    for plot in re.findall(r"<svg role.*?</svg>", text, re.DOTALL):
        found = set(re.findall(r"#[0-9a-f]{6}\b", plot))
        assert found <= {"#000000", COLOURS["peer"], "#1f77b4"}  # those of both themes; the last is an operation's
        assert "var(--accent)" in plot


def test_the_overview_has_a_line_for_each_case(folder: Path) -> None:
    page = read(folder, "index.html")
    (table,) = page.tables
    assert len(table) == 1 + CASES
    assert [text for text, _ in table[1]] == [
        "layer_norm",
        "forward",
        SHAPES[0],
        "float32",
        "0.0500 cpu",
        "0.0800 torch.compile",
        "1.60 ×",  # noqa: RUF001
    ]
    assert float(table[1][4][1] or "") == pytest.approx(0.05)
    assert float(table[1][6][1] or "") == pytest.approx(1.6)
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert text.index("Ours against the best peer") < text.index("<table") < text.index("<svg role")
    assert {row[0][0] for row in table[1:]} == {"layer_norm", "rope_attention"}
    assert {"layer_norm.html", "rope_attention.html"} <= set(page.addresses)


def test_the_overview_says_where_and_how_well_it_was_measured(folder: Path) -> None:
    page = read(folder, "index.html")
    text = " ".join(" ".join(page.words).split())
    for expected in (
        "Fake CPU",
        "CPU threads 1 copy 10.0 GB/s",
        "commit abcdef123456",
        "torch 2.99",
        "busy: other processes used 40% of the processors during the run",
        "faster in 16 of 32 cases, equal within noise in 0, slower in 16.",
        "far <away> runs on cuda only",
        f"rope_attention, training, {SHAPES[0]}, float32: some peer {FAILURE}",
        "python -m benchmarks all",
    ):
        assert expected in text, expected


def test_the_roofline_is_drawn_of_rates_and_intensities() -> None:
    """A line for each roof, bent where copying and multiplying take as long; three dots a case."""
    axes, found = Figure().subplots(), contests(contest("rope_attention", SHAPES[0], "float32", "forward"))
    draw_roofline(axes, found, machine())
    roofs, dots = axes.lines[:2], axes.lines[3:]
    assert [(line.get_xdata()[1], line.get_ydata()[1]) for line in roofs] == [(10, 0.1), (20, 0.2)]
    assert len({tuple(line.get_xdata()) for line in dots}) == 1
    assert dots[0].get_xdata()[0] == found[0].intensity == pytest.approx(19.7)
    best = ("torch eager", "torch.compile", "evakernels reference")
    rates = [1e4 * 197 / (0.1 * SPEEDS[name] * 1e9) for name in best]
    assert [line.get_ydata()[0] for line in dots] == pytest.approx(rates)


def test_an_operations_page_has_every_row_with_its_errors(folder: Path) -> None:
    (table,) = read(folder, "layer_norm.html").tables
    assert len(table) == 1 + 16 * 5
    head = [text for text, _ in table[0]]
    line = dict(zip(head, table[2], strict=True))
    shown = {name: text for name, (text, _) in line.items()}
    assert shown == {
        "candidate": "evakernels reference",
        "mode": "forward",
        "shape": SHAPES[0],
        "dtype": "float32",
        "ms": "0.400",
        "p20": "0.380",
        "p80": "0.420",
        "GB/s": "0.250",
        "TFLOP/s": "–",  # noqa: RUF001
        "roofline": "6.2 %",
        "× eager": "0.250",  # noqa: RUF001
        "peak MiB": "4.00",
        "saved MiB": "–",  # noqa: RUF001
        "error": "4.0e-06",
        "× eager's": "4.00",  # noqa: RUF001
        "first ms": "123",
        "version": "0.1.0",
    }
    assert line["TFLOP/s"][1] is None
    assert float(line["error"][1] or "") == 4e-6


def test_failures_are_told(folder: Path) -> None:
    page = read(folder, "rope_attention.html")
    failed = [line for line in page.tables[0] if line[4][0] == "failed"]
    assert len(failed) == 8
    assert all(value is None for _, value in failed[0][4:16])
    assert " ".join(page.words).count(FAILURE) == 8


def test_errors_beyond_the_rule_stand_out(folder: Path) -> None:
    text = (folder / "layer_norm.html").read_text(encoding="utf-8")
    bad = re.findall(r'<td class="bad" data-value="[^"]*">([^<]*)</td>', text)
    assert bad == ["4.0e-06", "4.00"] * 16


def test_bars_are_there_for_what_was_measured(folder: Path) -> None:
    plots = read(folder, "layer_norm.html").plots
    assert plots == [
        f"Bars: time of all candidates, {mode}, {dtype}"
        for dtype in ("float32", "bfloat16")
        for mode in ("forward", "training")
    ]


def test_a_page_gets_the_table_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Before\n<!-- benchmarks: begin -->\nold\n<!-- benchmarks: end -->\n## After\n")
    for _ in range(2):
        write_section(results(), page)
    text = page.read_text()
    assert text.startswith("# Before\n<!-- benchmarks: begin -->\n\n**Fake CPU**: ")
    assert text.endswith(
        "![Speed against eager PyTorch, and the share of the roofline, of each op](roofline.png)\n\n"
        "<!-- benchmarks: end -->\n## After\n"
    )
    assert "old" not in text
    assert "faster in 16 of 32 cases, equal within noise in 0, slower in 16." in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    headings = "forward, ms | best peer, ms | verdict | training, ms | best peer, ms | verdict"
    assert lines[0] == f"| op | shape | dtype | {headings} |"
    assert len(lines) == 2 + CASES // 2
    numbers = "0.0500 cpu | 0.0800 torch.compile | 1.60 × | 0.150 cpu | 0.240 torch.compile | 1.60 ×"  # noqa: RUF001
    assert lines[2] == f"| `layer_norm` | {SHAPES[0]} | float32 | {numbers} |"
    assert (tmp_path / "roofline.png").is_file()


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmarks: begin -->\n")
    with pytest.raises(UserError, match="has no place for the table: it goes between the lines"):
        write_section(results(), page)
    assert page.read_text() == "<!-- benchmarks: begin -->\n"


def test_several_results_stand_beside_each_other(tmp_path: Path) -> None:
    new = results(machine=machine(name="Other CPU"))
    new.rows = [one for one in new.rows if one.dtype == "float32"]
    for one in new.rows:
        one.device = "cuda"
        if one.candidate == "evakernels cpu":
            one.samples_ms = [[value / 2 for value in one_pass] for one_pass in one.samples_ms]
    write_beside({"old": results(), "new": new}, tmp_path)
    page = read(tmp_path, "index.html")
    (cases,) = page.tables
    assert [text for text, _ in cases[0]][4:] == ["old, ms", "old, verdict", "new, ms", "new, verdict", "× new"]  # noqa: RUF001
    lines = {tuple(text for text, _ in line[:4]): [text for text, _ in line[4:]] for line in cases[1:]}
    assert len(lines) == CASES
    case = ("layer_norm", "forward", SHAPES[0])
    assert lines[*case, "float32"] == ["0.0500 cpu", "1.60 ×", "0.0250 cpu", "3.20 ×", "2.00 ×"]  # noqa: RUF001
    assert lines[*case, "bfloat16"] == ["0.0500 cpu", "1.60 ×", "–", "–", "–"]  # noqa: RUF001
    assert {"old: Fake CPU", "new: Other CPU"} <= set(page.words)


def test_faster_and_slower_mean_that_the_spreads_do_not_touch() -> None:
    def found(ours: list[list[float]], eager: list[list[float]]) -> str:
        (contest,) = contests([row(samples_ms=ours), row(samples_ms=eager, candidate="torch eager", kind="baseline")])
        return verdict_text(contest)

    assert found([[1.0, 1.1]], [[2.0, 2.1]]) == "1.95 ×"  # noqa: RUF001
    assert found([[2.0, 2.0]], [[1.0, 1.0]]) == "0.500 × (slower)"  # noqa: RUF001
    # What slows down a round slows down both.
    assert found([[1.0, 9.0, 1.0]], [[1.2, 11.0, 1.2]]) == "1.20 ×"  # noqa: RUF001
    assert found([[1.0, 1.0, 1.0, 1.0]], [[1.2, 0.9, 0.9, 1.2]]) == LEVEL
    # Of the rounds nearly all are faster, of one of the passes they are not.
    assert found([[1.0] * 9, [1.0]], [[1.1] * 9, [0.9]]) == LEVEL
    # In nearly all rounds ours is faster, but its median over both passes is the larger one.
    assert found([[1.8] * 8, [3.9] * 8], [[2.4] * 7 + [2.6], [6.7] * 5 + [2.3] * 3]) == LEVEL
    assert verdict(contests([row(failure="x")])[0]) is None
    assert verdict(contests([row()])[0]) is None


def test_the_best_peer_is_the_fastest_that_is_right() -> None:
    eager = row(candidate="torch eager", kind="baseline", samples_ms=[[3.0]])
    fast = row(candidate="fast", kind="peer", samples_ms=[], failure="wrong: NaN among the outputs")
    slow = row(candidate="slow", kind="peer", samples_ms=[[4.0]])
    (contest,) = contests([row(samples_ms=[[2.0]]), eager, fast, slow])
    assert contest.rival is eager
    assert contest.peer is slow
    assert verdict_text(contest) == "1.50 ×"  # noqa: RUF001
    assert time_text(contest, "baseline", "peer") == "3.00 torch eager"
    (alone,) = contests([row(samples_ms=[[2.0]]), fast])
    assert (verdict_text(alone), time_text(alone, "baseline", "peer")) == ("–", "wrong")  # noqa: RUF001


def test_a_result_in_which_everything_failed_still_has_its_pages(tmp_path: Path) -> None:
    where = write_report(Results(machine(), [row(failure="no luck", samples_ms=[], op="my/op")]), tmp_path)
    assert "Nothing could be measured." in where.read_text(encoding="utf-8")
    assert page_name("my/op") == "my_op.html"
    assert "no luck" in (tmp_path / "my_op.html").read_text(encoding="utf-8")
    assert not (tmp_path / "roofline.png").exists()


def test_whole_models_get_a_picture_of_what_they_gain(tmp_path: Path) -> None:
    rows = [each for mode in ("forward", "training") for each in contest("dropin", SHAPES[0], "float32", mode)]
    write_report(results(rows=rows), tmp_path)
    with Image.open(tmp_path / "speedups.png") as picture:
        picture.load()
    axes = speedups(results(rows=rows), "dropin").axes[0]
    lengths = [bar.get_width() for bar in axes.patches]
    assert lengths == pytest.approx([1 / SPEEDS[name] for name in SPEEDS if name != "torch eager"])
