"""Where files may be written: never over inputs, and over other files only on request. Closed pipes."""

import os
import select
import sys
from collections.abc import Iterable
from pathlib import Path

from evaclip.atomic import require_writable
from evaclip.errors import UserError
from evaclip.runs.files import CHECKPOINTS_FOLDER, CONFIG_FILE, META_FILE, MODEL_CONFIG_FILE, MODEL_FILE, SHARDS_SUFFIX


def check_output(target: Path, *, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Makes sure that `target` may be written, before any work is done for it.

    Args:
        target: a file that is to be written.
        overwrite: whether it may replace a file that exists.
        sources: files that are read for it; these are never replaced, and neither is anything inside a run or a
            checkpoint, where a file that isn't the trainer's own makes a damaged checkpoint.

    Raises:
        UserError: it may not, or its folder doesn't exist or can't be written to.
    """
    name = repr(str(target))
    if target.exists() and any(source.exists() and target.samefile(source) for source in sources):
        raise UserError(f"{name} is an input and is never overwritten; choose another file")
    if (training := _run_around(target)) is not None:
        raise UserError(f"{name} is inside of {str(training)!r}, where only the training writes; choose another folder")
    require_writable(target, make_folder=False)
    if os.path.lexists(target) and not overwrite:
        raise UserError(f"{name} exists; --force (overwrite=True in Python) replaces it")


def silence() -> bool:
    """Discards further output if the reader of stdout, such as `head`, has closed it; returns whether it has."""
    said = select.poll()
    said.register(sys.stdout, 0)  # an error event means that the pipe has no reader
    gone = bool(said.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _run_around(target: Path) -> Path | None:
    """The folder of the run or the checkpoint that `target` would lie in."""
    folders = target.resolve().parents
    runs = (folder for folder in folders if (folder / CONFIG_FILE).is_file() and (folder / CHECKPOINTS_FOLDER).is_dir())
    return next(runs, None) or next(filter(_is_checkpoint, folders), None)


def _is_checkpoint(folder: Path) -> bool:
    facts = (META_FILE, MODEL_CONFIG_FILE)
    has_weights = (folder / MODEL_FILE).is_file() or (folder / f"{MODEL_FILE}{SHARDS_SUFFIX}").is_dir()
    return has_weights and any((folder / name).is_file() for name in facts)
