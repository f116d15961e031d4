"""What a run trains, as the trainer knows it: a model, what a batch is of, its loss, and how it is measured."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from evaclip.data import Source
from evaclip.data.config import DataConfig
from evaclip.data.loader import Targets, TrainTransform
from evaclip.model.config import Preprocess
from evaclip.model.vision import VisionTower
from evaclip.train.config import TrainConfig
from evaclip.train.distributed import World
from evaclip.train.micro_batch import MicroBatch, StepContext
from evaclip.train.transform import training_transform
from evaclip.transforms import levels_of

Size = int | tuple[int, int]
Evaluate = Callable[[Any, Callable[[], bool]], tuple[dict[str, float], list[str]]]
"""(model, whether this process was asked to stop) -> metrics, and a line on each set that could not be measured."""


class Task(ABC):
    """A model in training, with its loss, data and measures.

    Whatever is the same for all tasks stays in the trainer: accumulation, processes, precision, clipping,
    skipped updates, checkpoints, resolution, averages. It asks nothing but this class.

    Attributes:
        model: in training precision, on its device, sharded if the configuration says so. What it holds is trained and
            saved; other modules of a task, such as a teacher, aren't part of it.
        towers: parts of the model by name, with learning rates, gradient and update norms in the log; `visual` and
            `text` have the options of `optim.visual` and `optim.text`. `visual` is always there; of an image model it
            is the model itself.
        preprocess: what the model's images go through; the device normalises them so.
        captions: whether a sample without one can't be used.
    """

    captions: ClassVar[bool] = True

    def __init__(self, model: nn.Module, towers: Mapping[str, nn.Module], preprocess: Preprocess) -> None:
        self.model = model
        self.towers = dict(towers)
        self.preprocess = preprocess

    @classmethod
    @abstractmethod
    def create_model(cls, config: TrainConfig, **how: Any) -> nn.Module:
        """The model with its start values, or the weights that the configuration names.

        Args:
            how: device, precision, savings and prepare, as `evaclip.create_model` takes them: on the meta device the
                model has no values, and `prepare` shards it before it has any.
        """

    @staticmethod
    @abstractmethod
    def towers_of(model: Any) -> dict[str, nn.Module]:
        """See `towers`; known of a model before there is a task, to shard it."""

    @classmethod
    @abstractmethod
    def build(cls, config: TrainConfig, world: World, model: Any) -> Self:
        """The task for a model of `create_model`; locked parameters aren't trained."""

    def extra_tensors(self) -> Iterable[Tensor]:
        """Tensors outside the model that a step needs, such as a teacher's; plans count them."""
        return ()

    def teacher_identity(self) -> dict[str, Any]:
        """Identify the teacher, for example by a hash of its weights: plain values by name, none without a teacher.

        A checkpoint holds it, and a run resumes only with an equal one.
        """
        return {}

    def remarks(self) -> list[str]:
        """What is to be said before the run begins."""
        return []

    @classmethod
    def data(cls, config: TrainConfig) -> DataConfig:
        """How the training data is opened."""
        return config.data

    @classmethod
    def rows_per_group(cls, config: TrainConfig) -> int:
        """Number of consecutive rows that share a rank and a micro-batch."""
        return 1

    def transform(self, data: DataConfig, size: Size) -> TrainTransform:
        """What the data workers make of a picture, for images of this size; the device does the rest."""
        return levels_of(training_transform(data, size, self.preprocess), self.preprocess)

    @abstractmethod
    def targets(self, size: Size) -> Targets:
        """Makes the targets of captions and seeds in the data workers: tokens, labels, masks."""

    @abstractmethod
    def backward(self, context: StepContext) -> dict[str, Tensor]:
        """Runs this rank's rows through the model and accumulates the gradients of the loss.

        Returns:
            0-D tensors on the device, to be averaged over ranks: `loss`, and where
            `context.measure` asks for it what else is logged of a batch, by the names in the log, such as `accuracy`.
        """

    def after_update(self) -> None:  # noqa: B027 - most bound nothing
        """Called behind each update of the weights, without gradients, such as to bound them."""

    def measures(self) -> dict[str, Tensor]:
        """What is logged of the model itself, by the names in the log: 0-D on the device, the same in all processes."""
        return {}

    @abstractmethod
    def evaluation(self, config: TrainConfig, world: World, held_out: Source | None) -> Evaluate | None:
        """Measures the model while it trains, in all processes together; None without a set to measure it on.

        Args:
            held_out: samples that are held out of the training data.
        """

    @abstractmethod
    def flops_per_sample(self, size: Size) -> float:
        """Model FLOPs of a training step per sample with images of this size, forward and backward."""

    @abstractmethod
    def tokens_computed(self, targets: Tensor) -> int:
        """Tokens that enter blocks in a step with these targets, which lie in host memory.

        A token counts once, whatever is computed again.
        """

    @abstractmethod
    def stand_ins(self, rows: int, sizes: set[int], fake: Callable[[Any], Any]) -> Tensor:
        """Targets of samples that are as they are on average, without values, for `--as-gpus`.

        What a step on them reads of the values of targets in micro-batches of these sizes is settled here.

        Args:
            fake: replaces all tensors in its argument by fake ones.
        """

    @abstractmethod
    def descriptions(self, config: TrainConfig) -> dict[str, Any]:
        """JSON files next to the weights in a checkpoint, by file name."""

    @property
    def visual(self) -> VisionTower:
        """The image tower."""
        tower = self.towers["visual"]
        assert isinstance(tower, VisionTower)
        return tower


class MeanOverSamples(Task):
    """A task with a mean over samples as loss, so that gradients of micro-batches add up."""

    @abstractmethod
    def of_samples(self, images: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Per-sample values of a micro-batch, `[rows]` in float32 or wider: `loss` and others for the log.

        It runs under autocast where the configuration says so.

        Args:
            images: float32 [rows, 3, height, width], on the device and normalised.
            micro_batch: its other values; targets are on the device.
        """

    def backward(self, context: StepContext) -> dict[str, Tensor]:
        images, sums = context.images(), dict[str, Tensor]()
        for micro_batch in context.micro_batches:
            with context.autocast():
                found = self.of_samples(next(images), micro_batch.to(context.device))
            means = {name: context.mean_of(values) for name, values in found.items()}
            context.begin(micro_batch)
            context.scaled(means["loss"]).backward()
            sums = {name: value.detach() + sums.get(name, 0.0) for name, value in means.items()}
        return sums
