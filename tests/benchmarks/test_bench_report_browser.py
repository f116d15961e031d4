"""The pages in a real browser: plots that are drawn, tables that sort, nothing that sticks out on a phone."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bench_report_fakes import results

from benchmarks.report.page import write_report
from benchmarks.results import Results

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.exhaustive
PAGES = ("index.html", "rope_attention.html")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of one operation with matrix products."""
    everything = results()
    rows = [row for row in everything.rows if row.op == "rope_attention" and row.dtype == "float32"]
    return write_report(Results(everything.machine, rows), tmp_path_factory.mktemp("browser")).parent


@pytest.fixture
def page(browser: "Browser") -> Iterator["Page"]:
    """A page that may load files only, and whose errors fail the test."""
    complaints: list[str] = []
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        opened = context.new_page()
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        yield opened
    assert complaints == []


def column(page: "Page", table: str, number: int) -> list[str]:
    """The texts of a column, from the top."""
    return page.locator(f"#{table} tbody tr > :nth-child({number})").all_inner_texts()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_plots_are_drawn(page: "Page", folder: Path, name: str, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.goto((folder / name).as_uri())
    plots = page.locator("svg[role=img]").all()
    assert len(plots) == (1 if name == "index.html" else 2)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    for plot in plots:
        box = plot.bounding_box()
        assert min(box["width"], box["height"]) > 100
        boxes = "paths => paths.filter(path => path.getBoundingClientRect().width).length"
        assert plot.locator(":not(defs) path").evaluate_all(boxes) >= 5
        text = plot.locator("text").first
        assert text.bounding_box()["width"] > 0
        assert text.evaluate("text => getComputedStyle(text).fill") != background
    assert background == ("rgb(20, 23, 28)" if scheme == "dark" else "rgb(254, 254, 254)")


@pytest.mark.parametrize(("name", "table", "number"), [("index.html", "cases", 5), ("rope_attention.html", "rows", 5)])
def test_a_click_sorts_by_number_and_another_one_reverses(page, folder, name, table, number):
    page.goto((folder / name).as_uri())
    heading = page.locator(f"#{table} thead th:nth-child({number})")
    before = column(page, table, number)

    def numbers() -> list[float]:
        texts = [text.split()[0] for text in column(page, table, number)]
        return [float(text) if text != "failed" else float("inf") for text in texts]

    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    ascending = numbers()
    assert ascending == sorted(ascending)
    assert len(set(ascending)) > 3
    assert column(page, table, number) != before
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    measured = [value for value in ascending if value != float("inf")]
    failed = [float("inf")] * (len(ascending) - len(measured))
    assert numbers() == measured[::-1] + failed


def test_texts_sort_as_texts_and_only_one_heading_is_marked(page: "Page", folder: Path) -> None:
    page.goto((folder / "rope_attention.html").as_uri())
    page.locator("#rows thead").get_by_role("button", name="ms", exact=True).click()
    page.locator("#rows thead").get_by_role("button", name="candidate").click()
    names = column(page, "rows", 1)
    assert names == sorted(names)
    assert page.locator("#rows th[aria-sort]").count() == 1


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out(page: "Page", folder: Path, name: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    page.goto((folder / name).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.locator("svg[role=img], nav, .notes, .scroll, h1").evaluate_all(
        "parts => parts.filter(part => part.getBoundingClientRect().right > innerWidth).map(part => part.outerHTML)"
    )
    assert wide == []
