"""The report of a run: `report.html` and `report.png`, each complete in itself."""

import argparse
from pathlib import Path
from typing import Any

HTML_FILE = "report.html"
PNG_FILE = "report.png"


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


def add_commands(subparsers: Any) -> None:
    """Adds `evaclip report`."""
    from evaclip.cli import leaf

    parser = leaf(
        subparsers,
        "report",
        help="write report.html and report.png of a run",
        examples=["evaclip report runs/demo", "evaclip report runs/demo --output docs/report"],
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the folder of a run")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="where to write it (default: RUN_DIR)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    for path in write_report(args.run_dir, args.output):
        print(path)
