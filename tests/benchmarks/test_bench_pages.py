"""The HTML page, the Markdown section and the plots, against the rows of a published result."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bench_fakes import machine, row
from html_page import Page
from PIL import Image

from benchmarks import ROOT
from benchmarks.page import write_markdown, write_page
from benchmarks.render import NOTHING, significant, verdict_text
from benchmarks.results import Results, contests, read_results, verdict
from evaclip.errors import UserError

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as BrowserPage

pytestmark = pytest.mark.xdist_group("report")
FAILURE = "RuntimeError: no kernel for <head_dim> 64 & more"
PUBLISHED = read_results(ROOT / "benchmarks/results/amd-epyc-zen5-2026-11-29-all-float32.json")
RESULTS = replace(
    PUBLISHED,
    rows=[*PUBLISHED.rows, replace(PUBLISHED.rows[0], candidate="broken", kind="peer", samples_ms=[], failure=FAILURE)],
    absent={"far <away>": "runs on cuda only"},
)
CASES = contests(RESULTS.rows)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one result."""
    return write_page(RESULTS, tmp_path_factory.mktemp("page") / "new/run.html")


def test_page_needs_nothing_from_outside(file: Path) -> None:
    assert [file] == list(file.parent.iterdir())
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)|<(link|iframe|img)\b", text)
    assert len(set(page.plots)) == len(page.plots) > 10  # the roofline, and speedups of each op


def test_page_tables_hold_every_row(file: Path) -> None:
    page = Page(file.read_text(encoding="utf-8"))
    cases, rows = page.tables
    assert (len(cases), len(rows)) == (1 + len(CASES), 1 + len(RESULTS.rows))
    first = dict(zip([text for text, _ in cases[0]], cases[1], strict=True))
    assert float(first["ours, ms"][1]) == CASES[0].fastest("ours").median_ms
    assert float(first["verdict"][1]) == verdict(CASES[0]).ratio
    line = dict(zip([text for text, _ in rows[0]], rows[1], strict=True))
    assert (line["candidate"][0], line["shape"][0]) == (RESULTS.rows[0].candidate, RESULTS.rows[0].shape)
    assert float(line["error"][1]) == RESULTS.rows[0].error
    text = " ".join(" ".join(page.words).split())
    for expected in (FAILURE, "far <away> runs on cuda only", RESULTS.machine.name, RESULTS.machine.notes[0]):
        assert expected in text


def test_page_without_any_time(tmp_path: Path) -> None:
    failed = Results(machine(), [row(failure="no luck", samples_ms=[], op="my/op")])
    assert "no luck" in write_page(failed, tmp_path / "run.html").read_text(encoding="utf-8")


def test_markdown_section_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Before\n<!-- benchmarks: begin -->\nold\n<!-- benchmarks: end -->\n## After\n")
    for _ in range(2):
        write_markdown(RESULTS, page)
    text = page.read_text()
    assert text.startswith("# Before\n<!-- benchmarks: begin -->\n")
    assert text.endswith("\n<!-- benchmarks: end -->\n## After\n")
    assert "old" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len({(one.op, one.shape, one.dtype) for one in CASES})
    first = CASES[0]
    start = f"| `{first.op}` | {first.shape} | {first.dtype} | {significant(first.fastest('ours').median_ms)} "
    assert lines[2].startswith(start)
    assert verdict_text(first) in lines[2]
    write_markdown(replace(RESULTS, rows=[replace(one, op="dropin") for one in first.rows]), page)
    for name in ("roofline.png", "speedups.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"


def test_engine_table_has_every_row_by_precision(tmp_path: Path) -> None:
    shapes = {"eva02-b16@224 b1": 1, "eva02-b16:text b8": 8}
    times = {"evakernels": (3, 2), "openvino": (2, 2.5), "onnxruntime": (9, 9), "evakernels int8": (1, 1)}
    rows = [
        row(op="embed", candidate=name, shape=shape, samples_ms=[[ms]], error=0.1, sizes={"batch": batch})
        for name, several in times.items()
        for (shape, batch), ms in zip(shapes.items(), several, strict=True)
    ]
    rows.append(row(op="embed", candidate="zentorch", shape="eva02-b16@224 b1", samples_ms=[], failure="no luck"))
    page, absent = tmp_path / "page.md", {"embed: fastembed": "not installed"}
    page.write_text(
        "".join(f"<!-- {name}: begin -->old<!-- {name}: end -->\n" for name in ("engines", "engines, busy"))
    )
    write_markdown(Results(machine(busy=True), rows, absent), page)
    text = page.read_text()
    assert "<!-- engines: begin -->old<!-- engines: end -->" in text
    assert "load one spinning process per core" in text
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert lines == [
        "| openvino | fp32 | 0.9950 | 0.9950 | **2.00** | 2.50 |",
        "| `Encoder` | fp32 | 0.9950 | 0.9950 | 3.00 | **2.00** |",
        "| onnxruntime | fp32 | 0.9950 | 0.9950 | 9.00 | 9.00 |",
        f"| zentorch | fp32 | {NOTHING} | {NOTHING} | failed | {NOTHING} |",
        "| `Encoder` | int8 | 0.9950 | 0.9950 | **1.00** | **1.00** |",
    ]
    assert "- zentorch: no luck\n- fastembed: not installed" in text


def test_engines_share_no_section_with_other_operations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--page must get embed alone"):
        write_markdown(Results(machine(), [row(), row(op="embed")]), tmp_path / "page.md")


def test_markdown_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmarks: begin -->\n")
    with pytest.raises(UserError, match=r"page\.md"):
        write_markdown(RESULTS, page)
    assert page.read_text() == "<!-- benchmarks: begin -->\n"


@pytest.fixture
def page(browser: "Browser") -> Iterator["BrowserPage"]:
    """A browser's page that may load files only; an error in it fails the test."""
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
def test_page_fits_and_sorts_in_a_browser(page: "BrowserPage", file: Path, scheme: str, width: int) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": width, "height": 844})
    page.goto(file.as_uri())
    for plot in page.locator("svg[role=img]").all():
        box = plot.bounding_box()
        assert min(box["width"] / 4, box["height"]) > 40  # a single case is a flat plot
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for table, number in (("cases", 5), ("rows", 6)):
        heading = page.locator(f"#{table} thead th:nth-child({number})")
        for order in ("ascending", "descending"):
            heading.get_by_role("button").click()
            assert heading.get_attribute("aria-sort") == order
            texts = page.locator(f"#{table} tbody tr > :nth-child({number})").all_inner_texts()
            numbers = [float(text.split()[0].replace(",", "")) for text in texts if text[:1].isdigit()]
            assert numbers == sorted(numbers, reverse=order == "descending")
