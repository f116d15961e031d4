"""The transform of training images, by its name in the configuration."""

from pkgutil import resolve_name

from evaclip.data.config import DataConfig
from evaclip.data.loader import TrainTransform
from evaclip.errors import UserError
from evaclip.model.config import Preprocess


def training_transform(data: DataConfig, size: int | tuple[int, int], preprocess: Preprocess) -> TrainTransform:
    """What `data.transform` names.

    Raises:
        UserError: there is nothing of this name that can be called.
    """
    try:
        named = resolve_name(data.transform)
    except (ImportError, AttributeError, ValueError) as exc:
        expected = "expected MODULE:NAME, the module installed or in a folder of PYTHONPATH"
        raise UserError(f"data.transform={data.transform!r} isn't there: {exc}; {expected}") from exc
    if not callable(named):
        raise UserError(f"data.transform={data.transform!r} is a {type(named).__name__}; expected MODULE:CLASS")
    transform: TrainTransform = named(size, preprocess, data.augmentation)
    return transform
