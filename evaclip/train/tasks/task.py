"""The interface of tasks: a model, its targets, loss and evaluation; and what tasks of an image model share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from pkgutil import resolve_name
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from evaclip.data import Source
from evaclip.data.config import DataConfig
from evaclip.data.loader import Batch, Targets, TrainTransform
from evaclip.errors import UserError
from evaclip.model.config import Preprocess, VisionConfig
from evaclip.model.vision import VisionTower
from evaclip.model.vision_model import VisionModel
from evaclip.runs.files import MODEL_CONFIG_FILE, PREPROCESS_FILE
from evaclip.train.config import LossConfig, ModelConfig, TowerConfig, TrainConfig
from evaclip.train.distributed import World
from evaclip.train.micro_batch import MicroBatch, StepContext, send
from evaclip.transforms import ImageSize, levels_of

Size = int | tuple[int, int]
Evaluate = Callable[[Any, Callable[[], bool]], tuple[dict[str, float], list[str]]]
"""(model, whether this process was asked to stop) -> metrics, and a line on each set that could not be measured."""


class Task(ABC):
    """A model in training with its loss, data and evaluation; the trainer does everything else.

    Attributes:
        model: in training precision, on its device, sharded if configured. All of it is trained and saved; other
            modules of a task, such as a teacher, aren't part of it.
        towers: parts of the model by name, with learning rates and norms in the log; `visual` and `text` use
            `optim.visual` and `optim.text`. `visual` always exists; for an image model it is the model.
        preprocess: normalisation of the model's images.
        captions: whether samples need one.
    """

    captions: ClassVar[bool] = True

    def __init__(self, model: nn.Module, towers: Mapping[str, nn.Module], preprocess: Preprocess) -> None:
        self.model = model
        self.towers = dict(towers)
        self.preprocess = preprocess

    @classmethod
    @abstractmethod
    def create_model(cls, config: TrainConfig, **how: Any) -> nn.Module:
        """The model with its initial values, or the configured weights.

        Args:
            how: device, precision and prepare, as for `evaclip.create_model`: on the meta device the model has no
                values, and `prepare` shards it before it has any.
        """

    @staticmethod
    @abstractmethod
    def towers_of(model: Any) -> dict[str, nn.Module]:
        """The `towers` of a model, before there is a task."""

    @classmethod
    @abstractmethod
    def build(cls, config: TrainConfig, world: World, model: Any) -> Self:
        """The task for a model of `create_model`; locked parameters aren't trained."""

    def extra_tensors(self) -> Iterable[Tensor]:
        """Tensors outside the model that a step needs, such as a teacher's; plans count them."""
        return ()

    def teacher_identity(self) -> dict[str, Any]:
        """Plain values that identify the teacher, such as a hash of its weights; empty without a teacher.

        A checkpoint holds them, and a run resumes only with equal ones.
        """
        return {}

    def remarks(self) -> list[str]:
        """Lines to print before the run begins."""
        return []

    @classmethod
    def data(cls, config: TrainConfig) -> DataConfig:
        """How to open the training data."""
        return config.data

    @classmethod
    def rows_per_group(cls, config: TrainConfig) -> int:
        """Number of consecutive rows that share a rank and a micro-batch."""
        return 1

    def transform(self, data: DataConfig, size: Size) -> TrainTransform:
        """The transform of training images in the data workers, for images of this size."""
        return levels_of(training_transform(data, size, self.preprocess), self.preprocess)

    @abstractmethod
    def targets(self, size: Size) -> Targets:
        """Makes the targets of captions and seeds in the data workers: tokens, labels, masks."""

    @abstractmethod
    def backward(self, context: StepContext) -> dict[str, Tensor]:
        """Runs this rank's rows through the model and accumulates the gradients of the loss.

        Returns:
            0-D tensors on the device, to be averaged over ranks: `loss`, and with `context.measure` other metrics of
            the batch by their names in the log, such as `accuracy`.
        """

    def after_update(self) -> None:  # noqa: B027 - most bound nothing
        """Called after each update of the weights, without gradients, such as to bound them."""

    def measures(self) -> dict[str, Tensor]:
        """Metrics of the model by their names in the log: 0-D on the device, equal on all ranks."""
        return {}

    @abstractmethod
    def evaluation(self, config: TrainConfig, world: World, validation: Source | None) -> Evaluate | None:
        """Evaluates the model during training, on all ranks together; None without a set.

        Args:
            validation: the validation split.
        """

    @abstractmethod
    def flops_per_sample(self, size: Size) -> float:
        """Model FLOPs of a training step per sample with images of this size, forward and backward."""

    @abstractmethod
    def tokens_computed(self, batch: Batch) -> int:
        """Tokens that enter blocks in a step with this batch in host memory; recomputed ones count once."""

    @abstractmethod
    def stand_ins(self, rows: int, sizes: set[int], fake: Callable[[Any], Any]) -> Tensor:
        """Targets of average samples, without values, for `--as-gpus`.

        Values of targets that a step would read are fixed here.

        Args:
            sizes: of micro-batches.
            fake: replaces all tensors in its argument by fake ones.
        """

    @abstractmethod
    def descriptions(self, config: TrainConfig) -> dict[str, Any]:
        """JSON files next to the weights in a checkpoint, by file name."""

    @property
    def files(self) -> dict[str, bytes]:
        """Further files of a checkpoint by path, which must stay the same over a run."""
        return {}

    @property
    def visual(self) -> VisionTower:
        """The image tower."""
        tower = self.towers["visual"]
        assert isinstance(tower, VisionTower)
        return tower


def training_transform(data: DataConfig, size: ImageSize, preprocess: Preprocess) -> TrainTransform:
    """The transform that `data.transform` names.

    Raises:
        UserError: nothing of this name can be called.
    """
    try:
        named = resolve_name(data.transform)
    except (ImportError, AttributeError, ValueError) as exc:
        expected = "MODULE:NAME, the module installed or in a folder of PYTHONPATH"
        raise UserError(f"data.transform must be {expected}, got {data.transform!r}: {exc}") from exc
    if not callable(named):
        raise UserError(f"data.transform must be MODULE:CLASS, got {data.transform!r}, a {type(named).__name__}")
    transform: TrainTransform = named(size, preprocess, data.augmentation)
    return transform


class ImageModelTask(Task):
    """A task of an image model with a mean over samples as loss, so that gradients of micro-batches add up.

    Attributes:
        unused: keys of `model` that have no effect on the task.
    """

    unused: ClassVar[tuple[str, ...]] = ("pretrained_text", "lock_text", "lock_text_unlocked_layers")

    @staticmethod
    def towers_of(model: Any) -> dict[str, nn.Module]:
        return {"visual": model}

    @classmethod
    def refuse_unused(cls, config: TrainConfig) -> None:
        """Raises UserError for settings without effect."""
        options = {each.name for each in fields(VisionConfig)}
        settings = [f"model.{key}" for key in cls.unused if getattr(config.model, key) != getattr(ModelConfig(), key)]
        settings += ["loss"] if config.loss != LossConfig() else []
        settings += ["optim.text"] if config.optim.text != TowerConfig() else []
        settings += [f"model.options.{key}" for key in config.model.options if key not in options]
        if settings:
            raise UserError(f"task.name={config.task.name} has no {', '.join(settings)}: leave that at its default")

    @abstractmethod
    def of_samples(self, images: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Values per sample of a micro-batch, `[rows]` in float32 or wider: `loss` and others for the log.

        Args:
            images: float32 [rows, 3, height, width], on the device and normalised.
            micro_batch: its other values; targets are on the device.
        """

    def backward(self, context: StepContext) -> dict[str, Tensor]:
        images, sums = context.images(), dict[str, Tensor]()
        for micro_batch in context.micro_batches:
            on_device = replace(micro_batch, targets=send(micro_batch.targets, context.device))
            with context.autocast():
                per_sample = self.of_samples(next(images), on_device)
            means = {name: context.mean_of(values) for name, values in per_sample.items()}
            context.begin(micro_batch)
            context.scaled(means["loss"]).backward()
            sums = {name: value.detach() + sums.get(name, 0.0) for name, value in means.items()}
        return sums


def describe_image_model(model: VisionModel, config: TrainConfig, num_classes: int, **options: Any) -> dict[str, Any]:
    """`Task.descriptions` of an image model with this number of classes; `options` replace the model's."""
    return {
        PREPROCESS_FILE: {"image_size": model.config.image_size, **asdict(model.preprocess)},
        MODEL_CONFIG_FILE: {"name": config.model.name, "num_classes": num_classes, **asdict(model.config), **options},
    }
