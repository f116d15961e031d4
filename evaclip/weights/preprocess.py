"""The preprocessing of images, in a file beside the weights it belongs to."""

import json
from pathlib import Path
from typing import Any

from evaclip.errors import UserError
from evaclip.model.config import CLIPConfig, Preprocess, override

PREPROCESS_FILE = "preprocess.json"
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
        # The size follows from the model; it is written for those who read the file without one.
        options.pop(_SIZE, None)
        return override(Preprocess(), options)
    except (ValueError, AttributeError) as exc:
        raise UserError(f"{path} isn't a JSON object with the preprocessing: {exc}") from exc
    except UserError as exc:
        raise UserError(f"{path}: {exc}") from exc
