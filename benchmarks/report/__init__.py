"""What people look at: pages, plots and a Markdown table of a result."""

from pathlib import Path

from benchmarks.results import Results

MARKDOWN_FILE, ROOFLINE_FILE, SPEEDUPS_FILE = "summary.md", "roofline.png", "speedups.png"

_WHOLE_MODELS = "dropin"


def write_report(results: Results, folder: Path) -> Path:
    """Writes the report of a result into `folder`; returns the path of its first page.

    It leaves `index.html` and a page for each operation, each complete in itself; `roofline.png` and a PNG for each
    operation; and `summary.md`. Without anything measured there is no `roofline.png`; of whole models before and after
    `accelerate` there is `speedups.png` too.
    """
    # Imported here: the command line should not wait for matplotlib.
    from benchmarks.report.colours import colour_names
    from benchmarks.report.drawing import Paint
    from benchmarks.report.markdown import to_markdown
    from benchmarks.report.page import INDEX, Book, index_page, op_page
    from benchmarks.report.posters import write_op, write_roofline
    from benchmarks.report.roofline import page_name
    from benchmarks.report.speedups import write_speedups
    from evaclip.atomic import replacing, write_text

    folder.mkdir(parents=True, exist_ok=True)
    paint = Paint(colour_names(results.rows))
    book = Book(results, paint, tuple(dict.fromkeys(row.op for row in results.rows)))
    for op in book.ops:
        page = folder / page_name(op)
        write_text(page, op_page(book, op))
        with replacing(page.with_suffix(".png")) as temporary:
            write_op(results, op, paint, temporary)
    if any(row.failure is None for row in results.rows):
        with replacing(folder / ROOFLINE_FILE) as temporary:
            write_roofline(results, paint, temporary)
    if _WHOLE_MODELS in book.ops:
        with replacing(folder / SPEEDUPS_FILE) as temporary:
            write_speedups(results, _WHOLE_MODELS, paint, temporary)
    write_text(folder / MARKDOWN_FILE, to_markdown(results))
    write_text(folder / INDEX, index_page(book))
    return folder / INDEX
