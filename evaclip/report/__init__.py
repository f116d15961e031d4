"""The report of a run: `report.html`, complete in itself."""

from collections.abc import Sequence
from pathlib import Path

HTML_FILE = "report.html"
COMPARISON_FILE = "comparison.html"


def write_report(run_folder: Path, output: Path | None = None) -> Path:
    """Writes `report.html` from what a run folder holds.

    Args:
        run_folder: has `log.jsonl` and `config.yaml`; `evaluations/` and `galleries/` once it was evaluated.
        output: another folder for the page.

    Returns:
        Its path.

    Raises:
        UserError: it is no run folder, or nothing was logged yet.
    """
    # Imported here: the command line should not wait for matplotlib.
    from evaclip.atomic import write_text
    from evaclip.report.page import render_page
    from evaclip.report.run_data import read_run

    page = render_page(read_run(run_folder))
    folder = output or run_folder
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / HTML_FILE, page)
    return folder / HTML_FILE


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
