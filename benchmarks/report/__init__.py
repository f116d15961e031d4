"""What people look at: pages, plots and Markdown tables of results."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import Results
from evaclip.atomic import replacing, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Imports are inside: the command line should not wait for matplotlib.

ROOFLINE_FILE, SPEEDUPS_FILE = "roofline.png", "speedups.png"

_WHOLE_MODELS = "dropin"


def write_report(results: Results, folder: Path) -> Path:
    """Writes the report of a result into `folder`; returns the path of its first page.

    It leaves `index.html` and a page for each operation, each complete in itself, and `roofline.png`, without anything
    measured none; of whole models before and after `accelerate` there is `speedups.png` too.
    """
    from benchmarks.report.page import INDEX, index_page, op_page
    from benchmarks.report.speedups import speedups
    from benchmarks.report.tables import page_name

    folder.mkdir(parents=True, exist_ok=True)
    for op in dict.fromkeys(row.op for row in results.rows):
        write_text(folder / page_name(op), op_page(results, op))
    _write_overview(results, folder / ROOFLINE_FILE)
    _write_picture(speedups(results, _WHOLE_MODELS), folder / SPEEDUPS_FILE)
    write_text(folder / INDEX, index_page(results))
    return folder / INDEX


def write_beside(several: Mapping[str, Results], folder: Path) -> Path:
    """Writes one page, `index.html`, with the rows of several results beside each other; returns its path."""
    from benchmarks.report.beside import beside_page
    from benchmarks.report.page import INDEX

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / INDEX, beside_page(several))
    return folder / INDEX


def check_page(page: Path) -> None:
    """Raises `UserError` if a Markdown page has no place for the table of `write_section`."""
    from benchmarks.report.markdown import split_page

    split_page(page)


def write_section(results: Results, page: Path, picture: str = ROOFLINE_FILE) -> Path:
    """Puts the table of ours against the best peers between a Markdown page's markers, and a picture beside the page.

    Raises:
        UserError: the page lacks the markers.
    """
    from benchmarks.report.markdown import write_page

    drawn = _write_overview(results, page.parent / picture)
    write_page(results, page, picture=picture if drawn else "")
    return page


def _write_overview(results: Results, path: Path) -> bool:
    from benchmarks.report.overview import overview

    return _write_picture(overview(results), path)


def _write_picture(figure: "Figure | None", path: Path) -> bool:
    """Whether there is one."""
    if figure is not None:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
    return figure is not None
