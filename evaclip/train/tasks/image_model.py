"""What tasks of an image model by itself have in common."""

from dataclasses import asdict, fields
from typing import Any, ClassVar

from torch import nn

from evaclip.errors import UserError
from evaclip.model.config import VisionConfig
from evaclip.model.vision_model import VisionModel
from evaclip.run_files import MODEL_CONFIG_FILE, PREPROCESS_FILE
from evaclip.train.config import LossConfig, ModelConfig, TowerConfig, TrainConfig
from evaclip.train.tasks.task import MeanOverSamples

_OPTIONS = {each.name for each in fields(VisionConfig)}


class ImageModelTask(MeanOverSamples):
    """The model is the tower `visual`.

    Attributes:
        unused: keys of `model` that the task has no use for.
    """

    unused: ClassVar[tuple[str, ...]] = ("pretrained_text", "lock_text", "lock_text_unlocked_layers")

    @staticmethod
    def towers_of(model: Any) -> dict[str, nn.Module]:
        return {"visual": model}

    @classmethod
    def refuse_unused(cls, config: TrainConfig) -> None:
        """Raises UserError for settings that would do nothing."""
        given = [f"model.{key}" for key in cls.unused if getattr(config.model, key) != getattr(ModelConfig(), key)]
        given += ["loss"] if config.loss != LossConfig() else []
        given += ["optim.text"] if config.optim.text != TowerConfig() else []
        given += [f"model.options.{key}" for key in config.model.options if key not in _OPTIONS]
        if given:
            raise UserError(f"task.name={config.task.name} has no {', '.join(given)}: leave that at its default")


def described(model: VisionModel, config: TrainConfig, num_classes: int, **options: Any) -> dict[str, Any]:
    """`Task.descriptions` of an image model with so many classes; `options` replace the model's."""
    return {
        PREPROCESS_FILE: {"image_size": model.config.image_size, **asdict(model.preprocess)},
        MODEL_CONFIG_FILE: {"name": config.model.name, "num_classes": num_classes, **asdict(model.config), **options},
    }
