"""What people look at: pages, plots and Markdown tables of results."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.results import Results
from evaclip.atomic import replacing, write_text

# Imports are inside: the command line should not wait for matplotlib.

ROOFLINE_FILE, SPEEDUPS_FILE = "roofline.png", "speedups.png"

_WHOLE_MODELS = "dropin"


def write_report(results: Results, folder: Path) -> Path:
    """Writes the report of a result into `folder`; returns the path of its first page.

    It leaves `index.html` and a page for each operation, each complete in itself, and `roofline.png`, without anything
    measured none; of whole models before and after `accelerate` there is `speedups.png` too.
    """
    from benchmarks.report.colours import colour_names
    from benchmarks.report.drawing import Paint
    from benchmarks.report.page import INDEX, Book, index_page, op_page
    from benchmarks.report.roofline import page_name
    from benchmarks.report.speedups import write_speedups

    folder.mkdir(parents=True, exist_ok=True)
    book = Book(results, Paint(colour_names(results.rows)), tuple(dict.fromkeys(row.op for row in results.rows)))
    for op in book.ops:
        write_text(folder / page_name(op), op_page(book, op))
    _write_picture(results, folder)
    if _WHOLE_MODELS in book.ops:
        with replacing(folder / SPEEDUPS_FILE) as temporary:
            write_speedups(results, _WHOLE_MODELS, book.paint, temporary)
    write_text(folder / INDEX, index_page(book))
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

    write_page(results, page, picture=_write_picture(results, page.parent, picture))
    return page


def _write_picture(results: Results, folder: Path, name: str = ROOFLINE_FILE) -> str:
    """The name of the picture; empty if nothing was measured."""
    from benchmarks.report.colours import colour_names
    from benchmarks.report.drawing import Paint
    from benchmarks.report.posters import write_roofline

    if all(row.failure is not None for row in results.rows):
        return ""
    with replacing(folder / name) as temporary:
        write_roofline(results, Paint(colour_names(results.rows)), temporary)
    return name
