"""What the planner asks of a task besides what the trainer does: how a chunk passes through its model."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from evaclip.model.config import TextConfig
from evaclip.model.text import Layout
from evaclip.plan.phases import TEACHER
from evaclip.train.config import ClassificationTask, MaskedImageTask, TaskConfig, TrainConfig
from evaclip.train.step import Chunk
from evaclip.train.tasks import task_class
from evaclip.train.tasks.classification import classes_for
from evaclip.train.tasks.teacher import refuse_lone_parts

if TYPE_CHECKING:
    from evaclip.plan.job import Job

Fake = Callable[[Any], Any]


class Batch(NamedTuple):
    """A chunk without data: images, what the task has beside them, and which patches are kept."""

    images: Tensor
    targets: Tensor
    token_index: Tensor | None
    layout: Layout | None


class Planned(ABC):
    """A task on the model of a job, whose tensors have no data.

    Attributes:
        couples: the loss is of all samples at once. It isn't traced, see `loss`; and of several chunks each passes
            forward twice.
        before: the phase in front of the image tower's.
        task: the trainer's.
    """

    couples: ClassVar[bool] = False
    before: ClassVar[str | None] = None

    def __init__(self, job: "Job", model: Any) -> None:
        self.job = job
        self.model = model
        self.task: Any = task_class(job.task.name).build(job.run, job.sharding()[2], model)

    @classmethod
    def settled(cls, config: TrainConfig) -> TaskConfig:
        """The task of a run, with all that it takes of the data.

        Raises:
            UserError: as the run itself would.
        """
        return config.task

    @abstractmethod
    def targets(self, fake: Fake) -> tuple[Tensor, Layout | None]:
        """Those of a chunk; `fake` takes the values from all tensors in what it is given."""

    def warm_up(self, batch: Batch) -> None:  # noqa: B027 - most have nothing to do
        """Does what the first step alone does."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """What the backward pass begins from, by the phase that made it."""

    @abstractmethod
    def evaluate(self, batch: Batch) -> None:
        """The pass of an evaluation that needs most."""


def planned(task: TaskConfig) -> type[Planned]:
    """What there is to know of a task."""
    return _PLANNED[task.name]


def caption_lengths(count: int, mean: int, longest: int) -> list[int]:
    """Of `count` captions: one as long as can be, as in any large batch, and the others so that the mean is right."""
    if count == 1:
        return [mean]
    rest, extra = divmod(max(count * mean - longest, 2 * (count - 1)), count - 1)
    return [longest, *(min(rest + (index < extra), longest) for index in range(count - 1))]


def caption_tokens(lengths: list[int], config: TextConfig) -> Tensor:
    """Token ids `[len(lengths), context_length]` whose end tokens stand where the lengths say."""
    tokens = torch.zeros(len(lengths), config.context_length, dtype=torch.int64)
    tokens[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = config.vocab_size - 1
    return tokens


class _Contrastive(Planned):
    couples = True

    def targets(self, fake: Fake) -> tuple[Tensor, Layout | None]:
        job, text = self.job, self.job.config.text
        tokens = caption_tokens(caption_lengths(job.chunk, job.caption_tokens, text.context_length), text)
        layout = Layout.packed(tokens) if job.savings.pack_text else Layout.padded(tokens)
        found: tuple[Tensor, Layout] = fake((tokens, layout))
        return found

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        found = self.model(batch.images, batch.targets, token_index=batch.token_index, layout=batch.layout)
        return {"image.head": found[0], "text.head": found[1]}

    def evaluate(self, batch: Batch) -> None:
        self.model(batch.images, batch.targets, layout=batch.layout)


class _MeanOverSamples(Planned):
    def targets(self, fake: Fake) -> tuple[Tensor, Layout | None]:
        return self.task.stand_ins(self.job.chunk, {self.job.chunk}, fake), None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        chunk = Chunk(slice(0, len(batch.targets)), batch.targets, batch.token_index, 0, 0)
        return {"image.head": self.task.of_samples(batch.images, chunk)["loss"].sum()}

    def evaluate(self, batch: Batch) -> None:
        self.model(batch.images)


class _Classification(_MeanOverSamples):
    @classmethod
    def settled(cls, config: TrainConfig) -> TaskConfig:
        assert isinstance(config.task, ClassificationTask)
        return replace(config.task, classes=len(classes_for(config).names))


class _MaskedImage(_MeanOverSamples):
    """The teacher is traced with all its blocks, which takes no longer than a few with a backward pass."""

    before = TEACHER

    def __init__(self, job: "Job", model: Any) -> None:
        assert isinstance(job.task, MaskedImageTask)
        if job.mode == "replicate":  # as one GPU has what others would share out
            job = replace(job, task=replace(job.task, teacher=replace(job.task.teacher, shard=False)))
        super().__init__(job, model)

    @classmethod
    def settled(cls, config: TrainConfig) -> TaskConfig:
        assert isinstance(config.task, MaskedImageTask)
        refuse_lone_parts(config.task.teacher, config.parallel)
        return config.task

    def warm_up(self, batch: Batch) -> None:
        self.task.teacher(batch.images, self.model.present.grid)

    def evaluate(self, batch: Batch) -> None:
        self.forward(batch)  # by which pictures that are held out are measured


_PLANNED: dict[str, type[Planned]] = {
    "contrastive": _Contrastive,
    "classification": _Classification,
    "masked_image": _MaskedImage,
}
