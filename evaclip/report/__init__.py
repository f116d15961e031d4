"""The report of a run: `report.html` and `report.png`, each complete in itself."""

from collections.abc import Sequence
from pathlib import Path

HTML_FILE = "report.html"
PNG_FILE = "report.png"
COMPARISON_FILE = "comparison.html"


def write_report(run_folder: Path, output: Path | None = None) -> tuple[Path, Path]:
    """Writes `report.html` and `report.png` from what a run folder holds.

    Args:
        run_folder: has `log.jsonl` and `config.yaml`; `evaluations/` and `galleries/` once it was evaluated.
        output: another folder for the two files.

    Returns:
        The paths of both.

    Raises:
        UserError: it is no run folder, or nothing was logged yet.
    """
    # Imported here: the command line should not wait for matplotlib.
    from evaclip.atomic import replacing, write_text
    from evaclip.report.page import render_page
    from evaclip.report.poster import write_poster
    from evaclip.report.run_data import read_run

    run = read_run(run_folder)
    folder = output or run_folder
    folder.mkdir(parents=True, exist_ok=True)
    html, png = folder / HTML_FILE, folder / PNG_FILE
    write_text(html, render_page(run))
    with replacing(png) as temporary:
        write_poster(run, temporary)
    return html, png


def write_comparison(run_folders: Sequence[Path], output: Path) -> Path:
    """Writes `comparison.html`, several runs beside each other, and returns its path.

    Raises:
        UserError: one is no run folder or logged nothing yet, or there are too many.
    """
    from evaclip.atomic import write_text
    from evaclip.report.comparison import render_comparison

    page = render_comparison(run_folders)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / COMPARISON_FILE, page)
    return output / COMPARISON_FILE
