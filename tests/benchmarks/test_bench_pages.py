"""Tables on the terminal, the HTML page and the Markdown section, against the rows that they were made from."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bench_fakes import machine, registered, row, tanh, tanh_operation
from bench_report_fakes import FAILURE, SHAPES, SPEEDS, contest, results
from html_page import Page
from PIL import Image

from benchmarks.operation import peer
from benchmarks.page import write_markdown, write_page
from benchmarks.plots import draw_roofline, draw_speedups
from benchmarks.results import Results
from benchmarks.tables import PIPED_WIDTH, mebibytes, percent, print_operations, print_results, scientific, significant
from evaclip.errors import UserError

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as BrowserPage

pytestmark = pytest.mark.xdist_group("report")
CASES = 2 * 4 * 2 * 2


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one result."""
    return write_page({"run": results()}, tmp_path_factory.mktemp("page") / "new/run.html")


@pytest.fixture(autouse=True)
def piped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tests' own terminal is."""
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def test_numbers_as_text() -> None:
    given = (0, 0.000123, 0.0123456, 0.9999, 1.2, 99.96, 1234.5, 1234567, float("nan"))
    texts = ["0", "0.000123", "0.0123", "1.00", "1.20", "100", "1,230", "1,230,000", "nan"]
    assert [significant(value) for value in given] == texts
    assert [mebibytes(size) for size in (0, 1000, 3 << 19, 1 << 30)] == ["0", "<0.01", "1.50", "1,020"]
    assert [percent(share) for share in (0.001, 0.056, 0.1, 1.234)] == ["0.10 %", "5.6 %", "10 %", "123 %"]
    assert [scientific(value) for value in (0.0, 1.26e-7, float("nan"))] == ["0", "1.3e-07", "nan"]


def test_page_needs_nothing_from_outside(file: Path) -> None:
    assert [file] == list(file.parent.iterdir())
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)|<(link|iframe|img)\b", text)
    assert len(set(page.plots)) == len(page.plots) == 3  # the roofline, and speedups of each op


def test_page_tables_hold_every_row(file: Path) -> None:
    page = Page(file.read_text(encoding="utf-8"))
    cases, rows = page.tables
    assert len(cases) == 1 + CASES
    assert len(rows) == 1 + sum(len(contest("x", *case)) for case in [(SHAPES[0], "float32", "forward")]) * CASES - 16
    first = dict(zip([text for text, _ in cases[0]], cases[1], strict=True))
    assert float(first["ours, ms"][1]) == pytest.approx(0.05)
    assert float(first["verdict"][1]) == pytest.approx(1.6)
    line = dict(zip([text for text, _ in rows[0]], rows[2], strict=True))
    assert (line["candidate"][0], line["shape"][0]) == ("evakernels reference", SHAPES[0])
    assert float(line["error"][1]) == 4e-6
    assert line["TFLOP/s"][1] is None


def test_page_names_failures_and_doubts(file: Path) -> None:
    text = " ".join(" ".join(Page(file.read_text(encoding="utf-8")).words).split())
    assert text.count(FAILURE) == 8
    for expected in ("Fake CPU", "abcdef123456", "torch 2.99", "busy: other processes", "far <away> runs on cuda only"):
        assert expected in text, expected


def test_page_without_any_time(tmp_path: Path) -> None:
    failed = Results(machine(), [row(failure="no luck", samples_ms=[], op="my/op")])
    assert "no luck" in write_page({"run": failed}, tmp_path / "run.html").read_text(encoding="utf-8")


def test_page_of_several_results(tmp_path: Path) -> None:
    new = results(machine=machine(name="Other CPU"))
    new.rows = [one for one in new.rows if one.dtype == "float32"]
    for one in new.rows:
        one.device = "cuda"
        if one.candidate == "evakernels cpu":
            one.samples_ms = [[value / 2 for value in one_pass] for one_pass in one.samples_ms]
    page = Page(write_page({"old": results(), "new": new}, tmp_path / "both.html").read_text(encoding="utf-8"))
    (cases,) = page.tables
    lines = {tuple(text for text, _ in line[:4]): [value for _, value in line[4:]] for line in cases[1:]}
    assert len(lines) == CASES
    case = ("layer_norm", "forward", SHAPES[0])
    found = [float(value) for value in lines[*case, "float32"]]
    assert found == pytest.approx([0.05, 1.6, 0.025, 3.2, 2])
    assert lines[*case, "bfloat16"][2:] == [None, None, None]
    assert {"old: Fake CPU", "new: Other CPU"} <= set(page.words)


def test_markdown_section_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Before\n<!-- benchmarks: begin -->\nold\n<!-- benchmarks: end -->\n## After\n")
    for _ in range(2):
        write_markdown(results(), page)
    text = page.read_text()
    assert text.startswith("# Before\n<!-- benchmarks: begin -->\n\n**Fake CPU**: ")
    assert text.endswith("(roofline.png)\n\n<!-- benchmarks: end -->\n## After\n")
    assert "old" not in text
    assert "faster in 16 of 32 cases" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + CASES // 2
    numbers = "0.0500 cpu | 0.0800 torch.compile | 1.60 × | 0.150 cpu | 0.240 torch.compile | 1.60 ×"  # noqa: RUF001
    assert lines[2] == f"| `layer_norm` | {SHAPES[0]} | float32 | {numbers} |"
    with Image.open(tmp_path / "roofline.png") as picture:
        assert picture.format == "PNG"


def test_markdown_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmarks: begin -->\n")
    with pytest.raises(UserError, match=r"page\.md"):
        write_markdown(results(), page)
    assert page.read_text() == "<!-- benchmarks: begin -->\n"


def test_whole_models_get_a_picture(tmp_path: Path) -> None:
    rows = [each for mode in ("forward", "training") for each in contest("dropin", SHAPES[0], "float32", mode)]
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmarks: begin --><!-- benchmarks: end -->")
    write_markdown(results(rows=rows), page)
    assert (tmp_path / "speedups.png").is_file()
    axes = draw_speedups(results(rows=rows), "dropin").axes[0]
    lengths = [bar.get_width() for bar in axes.patches]
    assert lengths == pytest.approx([1 / SPEEDS[name] for name in SPEEDS if name != "torch eager"])


def test_roofline_of_rates_and_intensities() -> None:
    """A line for each roof, bent where copying and multiplying take as long; three dots a case."""
    rows = contest("rope_attention", SHAPES[0], "float32", "forward")
    axes = draw_roofline(results(rows=rows)).axes[0]
    roofs, dots = axes.lines[:2], axes.lines[3:]
    assert [(line.get_xdata()[1], line.get_ydata()[1]) for line in roofs] == [(10, 0.1), (20, 0.2)]
    assert dots[0].get_xdata()[0] == pytest.approx(19.7)
    best = ("torch eager", "torch.compile", "evakernels reference")
    rates = [1e4 * 197 / (0.1 * SPEEDS[name] * 1e9) for name in best]
    assert [line.get_ydata()[0] for line in dots] == pytest.approx(rates)


def test_terminal_shows_each_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    print_results(results())
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= PIPED_WIDTH
    assert text.count("! busy: other processes") == 2
    assert text.count(" · float32\n") == text.count(" · bfloat16\n") == 4
    for expected in ("Fake CPU", "0.0800 torch.compile", FAILURE, "absent: far <away>, runs on cuda only"):
        assert expected in text
    monkeypatch.setenv("COLUMNS", "80")
    print_results(results(rows=contest("rope_attention", SHAPES[1], "float32", "training")))
    narrow = capsys.readouterr().out
    assert "8.0e-07" in narrow
    assert "first" not in narrow


def test_operations_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with registered(tanh_operation(), mine=tanh):
        peer("tanh", "elsewhere", devices=("cuda",))(lambda shape: tanh)
        print_operations([tanh_operation()], "cpu")
        print_operations([tanh_operation(shapes={})], "cuda")
    text = capsys.readouterr().out
    for expected in ("hyperbolic tangent", "(x: torch.Tensor)", "tiny b2", "elsewhere: runs on cuda only"):
        assert expected in text


@pytest.fixture
def page(browser: "Browser") -> Iterator["BrowserPage"]:
    """A browser's page that may load files only, and whose errors fail the test."""
    complaints: list[str] = []
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        opened = context.new_page()
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        yield opened
    assert complaints == []


@pytest.mark.exhaustive
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_page_in_a_browser(page: "BrowserPage", file: Path, scheme: str, width: int) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": width, "height": 844})
    page.goto(file.as_uri())
    for plot in page.locator("svg[role=img]").all():
        box = plot.bounding_box()
        assert min(box["width"], box["height"]) > 80
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.exhaustive
@pytest.mark.parametrize(("table", "number"), [("cases", 5), ("rows", 6)])
def test_click_sorts_and_another_reverses(page: "BrowserPage", file: Path, table: str, number: int) -> None:
    page.goto(file.as_uri())
    heading = page.locator(f"#{table} thead th:nth-child({number})")

    def numbers() -> list[float]:
        texts = page.locator(f"#{table} tbody tr > :nth-child({number})").all_inner_texts()
        return [float(text.split()[0]) for text in texts if text != "failed"]

    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert numbers() == sorted(numbers())
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert numbers() == sorted(numbers(), reverse=True)
