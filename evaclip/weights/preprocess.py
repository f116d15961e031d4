"""The preprocessing of images, in a file beside the weights it belongs to."""

import json
from pathlib import Path
from typing import Any

from evaclip.errors import UserError
from evaclip.model.config import CLIPConfig, Preprocess, override
from evaclip.run_files import PREPROCESS_FILE

_SIZE = "image_size"


def describe_preprocess(config: CLIPConfig) -> dict[str, Any]:
    """What the file says: image size, mean, standard deviation, interpolation, way of resizing."""
    return {_SIZE: config.vision.image_size, **config.to_dict()["preprocess"]}


def read_preprocess(weights: Path) -> Preprocess | None:
    """The preprocessing stored beside a weights file; None if there is none.

    Raises:
        UserError: for a file that can't be understood.
    """
    path = weights.parent / PREPROCESS_FILE
    if not path.is_file():
        return None
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise UserError(f"{path} isn't JSON: {exc}") from exc
    if not isinstance(options, dict):
        raise UserError(f"{path} holds a {type(options).__name__}; expected an object with the preprocessing")
    # The size follows from the model; it is written for those who read the file without one.
    options.pop(_SIZE, None)
    try:
        return override(Preprocess(), options)
    except UserError as exc:
        raise UserError(f"{path}: {exc}") from exc
