"""The report of a run: `report.html`, complete in itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaclip.atomic import write_text, writing
from evaclip.runs.files import REPORT_FILE

COMPARISON_FILE = "comparison.html"


def write_report(run_folder: Path, output: Path | None = None) -> Path:
    """Write `report.html` from the content of a run folder.

    Args:
        run_folder: has `log.jsonl` and `config.yaml`; `evaluations/` and `galleries/` once it was evaluated.
        output: another folder for the page.

    Returns:
        Its path.

    Raises:
        UserError: it is not a run folder, nothing was logged yet, or the page can't be written.
    """
    # Imported here: the command line should not wait for matplotlib.
    from evaclip.report.page import render_page

    return _write((output or run_folder) / REPORT_FILE, render_page(run_folder))


def write_comparison(run_folders: Sequence[Path], output: Path) -> Path:
    """Write `comparison.html`, several runs next to each other, and return its path.

    Raises:
        UserError: one is not a run folder or logged nothing yet, there are too many, or the page can't be written.
    """
    from evaclip.report.page import render_comparison

    return _write(output / COMPARISON_FILE, render_comparison(run_folders))


def render_template(file: str, /, **values: Any) -> str:
    """Render an HTML template of this folder; strings are escaped, unless they are `markupsafe.Markup`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("evaclip", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(file).render(values)


def _write(path: Path, page: str) -> Path:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    return path
