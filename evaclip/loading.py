"""From what a user names, a run, a checkpoint or a model, to a model with its tokenizer and transform."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaclip.errors import UserError
from evaclip.factory import create_model
from evaclip.model.clip import CLIP
from evaclip.model.config import find_model
from evaclip.run_files import CONFIG_FILE, EMA_FILE, MODEL_CONFIG_FILE, PREPROCESS_FILE
from evaclip.tokenizer import Tokenizer
from evaclip.transforms import EvalTransform
from evaclip.weights import find_weights
from evaclip.weights.hub import HUB, LOCAL

RANDOM = "random weights"
"""The origin of the weights of a model that is named without any."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with what its inputs need.

    Attributes:
        name: of the configuration.
        origin: where the weights come from.
        run: the folder of the run that it belongs to, if it belongs to one.
    """

    name: str
    origin: str
    model: CLIP
    tokenizer: Tokenizer
    transform: EvalTransform
    run: Path | None = None


def load_model(given: str, *, device: str = "cpu", average: bool = True) -> LoadedModel:
    """Loads what `given` names, in fp32.

    Args:
        given: a run folder (its latest checkpoint), a checkpoint folder, `hf-hub:OWNER/NAME`, `local-dir:FOLDER`, or
            NAME[:WEIGHTS], where WEIGHTS is the tag of released weights, a file or a folder; a NAME alone has random
            weights.
        device: where the model runs.
        average: of a checkpoint that holds averaged weights too, take those.

    Raises:
        UserError: it is none of these.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return _load_checkpoint(path, device, average)
    if given.startswith((HUB, LOCAL)):
        return _loaded(given, given, create_model(given, device=device))
    name, _, weights = given.partition(":")
    if find_model(name) is None and len(path.parts) > 1:
        raise UserError(f"there is no folder {given!r}; give a run folder, a checkpoint folder or NAME[:WEIGHTS]")
    model = create_model(name, pretrained=weights or None, device=device)
    return _loaded(name, weights or RANDOM, model)


def _load_checkpoint(folder: Path, device: str, average: bool) -> LoadedModel:
    weights = find_weights(folder, "")
    checkpoint = weights.parent
    if average and (checkpoint / EMA_FILE).is_file():
        weights = checkpoint / EMA_FILE
    options = _model_options(checkpoint / MODEL_CONFIG_FILE)
    name = str(options.pop("name"))
    if (checkpoint / PREPROCESS_FILE).is_file():
        options.pop("preprocess", None)
    run = folder if (folder / CONFIG_FILE).is_file() else checkpoint.parent.parent
    is_run = (run / CONFIG_FILE).is_file()
    model = create_model(name, pretrained=weights, device=device, **options)
    return _loaded(name, str(weights), model, run if is_run else None)


def _model_options(path: Path) -> dict[str, Any]:
    try:
        options: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UserError(
            f"{path} cannot be read, so that the model of this checkpoint is not known ({exc}); "
            f"give it as NAME:{path.parent}"
        ) from exc
    return options


def _loaded(name: str, origin: str, model: CLIP, run: Path | None = None) -> LoadedModel:
    transform = EvalTransform(model.config.vision.image_size, model.config.preprocess)
    return LoadedModel(
        name, origin, model, Tokenizer(model.config.text.context_length, model.config.text.vocab_size), transform, run
    )
