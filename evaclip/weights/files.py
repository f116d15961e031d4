"""Weights files: what a path or a name stands for, and reading it."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from evaclip.errors import UserError
from evaclip.run_files import CHECKPOINTS_FOLDER, LATEST_FILE, MODEL_FILE
from evaclip.weights.layouts import to_original
from evaclip.weights.released import download

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def find_weights(source: str | Path, model: str) -> Path:
    """The weights file that `source` stands for.

    Args:
        source: a weights file, a checkpoint folder (or the pointer `checkpoints/latest` to one), a run folder
            (its latest checkpoint), or the tag of released weights.
        model: name of the configuration whose released weights are meant.

    Raises:
        UserError: for a source that is none of these.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.name == LATEST_FILE and path.is_file():
        return _in_folder(_pointed_at(path))
    if path.is_file():
        return path
    if isinstance(source, Path) or path.suffix in _SUFFIXES or len(path.parts) > 1:
        raise UserError(f"there is no weights file or checkpoint folder {str(source)!r}")
    return download(model, str(source))


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file on the CPU, under the names that models here use.

    Reads `.safetensors`, and `.pt`, `.pth`, `.bin` of `torch.save`, without running any code of theirs. All
    layouts of EVA-CLIP are known: the authors', open_clip's, with wrappers of training programs, with a flat
    text tower.

    Raises:
        UserError: for a file that is missing, damaged or no state dict.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{str(path)!r} isn't a weights file; expected one of {', '.join(_SUFFIXES)}")
    try:
        content = _read(path)
    except FileNotFoundError:
        raise UserError(f"there is no weights file {str(path)!r}") from None
    except UnpicklingError as exc:
        raise UserError(f"{str(path)!r} is damaged, or holds other things than tensors and plain values") from exc
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as exc:
        raise UserError(f"{str(path)!r} can't be read as weights: {exc}") from exc
    if not isinstance(content, Mapping):
        raise UserError(f"{str(path)!r} holds a {type(content).__name__}; expected tensors by name")
    try:
        return to_original(content)
    except UserError as exc:
        raise UserError(f"{str(path)!r}: {exc}") from None


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    # Memory mapping needs the zip format, which torch.save has written since 1.6.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _in_folder(folder: Path) -> Path:
    pointer = folder / CHECKPOINTS_FOLDER / LATEST_FILE
    if pointer.is_file():
        folder = _pointed_at(pointer)
    if not (folder / MODEL_FILE).is_file():
        raise UserError(
            f"the folder {str(folder)!r} has no {MODEL_FILE}; expected a checkpoint such as "
            "runs/NAME/checkpoints/step_00000100, or a run that has one"
        )
    return folder / MODEL_FILE


def _pointed_at(pointer: Path) -> Path:
    return pointer.parent / pointer.read_text(encoding="utf-8").strip()
