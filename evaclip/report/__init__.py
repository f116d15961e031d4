"""The report of a run: `report.html`, complete in itself."""

from collections.abc import Sequence
from pathlib import Path

from evaclip.atomic import write_text, writing
from evaclip.run_files import REPORT_FILE

COMPARISON_FILE = "comparison.html"


def write_report(run_folder: Path, output: Path | None = None) -> Path:
    """Writes `report.html` from what a run folder holds.

    Args:
        run_folder: has `log.jsonl` and `config.yaml`; `evaluations/` and `galleries/` once it was evaluated.
        output: another folder for the page.

    Returns:
        Its path.

    Raises:
        UserError: it is no run folder, nothing was logged yet, or the page can't be written.
    """
    # Imported here: the command line should not wait for matplotlib.
    from evaclip.report.page import render_page
    from evaclip.report.run_data import read_run

    return _written((output or run_folder) / REPORT_FILE, render_page(read_run(run_folder)))


def write_comparison(run_folders: Sequence[Path], output: Path) -> Path:
    """Writes `comparison.html`, several runs next to each other, and returns its path.

    Raises:
        UserError: one is no run folder or logged nothing yet, there are too many, or the page can't be written.
    """
    from evaclip.report.page import render_comparison

    return _written(output / COMPARISON_FILE, render_comparison(run_folders))


def _written(path: Path, page: str) -> Path:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    return path
