"""Progressive resolution: a run that begins with small images, as Perception Encoder's (Bolya et al. 2025)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from evaclip.data.loader import TrainLoader, TrainTransform
from evaclip.model.clip import CLIP
from evaclip.model.flops import flops_per_sample
from evaclip.train.config import ScheduleConfig
from evaclip.train.schedule import image_parts, image_size_at
from evaclip.train.throughput import BACKWARD_FACTOR

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Resolution:
    """Gives the model and the loader of a run the image size of a step.

    Attributes:
        make_transform: the training transform for an image size.
    """

    model: CLIP
    loader: TrainLoader
    schedule: ScheduleConfig
    total_steps: int
    make_transform: Callable[[Size], TrainTransform]

    def at(self, step: int) -> Size:
        """The image size of a step, counted from 0: at the end the model's own."""
        return image_size_at(step, self.total_steps, self.schedule) or self.model.config.vision.image_size

    def begin(self, step: int) -> None:
        """From now on the model takes, and the loader's next iterator gives, images of the size of this step."""
        self.model.visual.set_image_size(self.at(step))
        self.loader.set_transform(self.make_transform(self.at(step)))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the model takes images of its own size."""
        size = self.model.visual.present.image_size
        self.model.visual.set_image_size(self.model.config.vision.image_size)
        try:
            yield
        finally:
            self.model.visual.set_image_size(size)

    def flops_per_sample(self, step: int) -> float:
        """Model FLOPs of a training step per sample, forward and backward."""
        config = self.model.config
        config = replace(config, vision=replace(config.vision, image_size=self.at(step)))
        return BACKWARD_FACTOR * flops_per_sample(config, 1 - self.model.visual.patch_dropout)

    def flops_left(self, step: int) -> float:
        """The same of one sample in each of the steps from `step` to the end."""
        parts = [range(max(step, steps.start), steps.stop) for steps, _ in image_parts(self.total_steps, self.schedule)]
        return sum(len(steps) * self.flops_per_sample(steps.start) for steps in parts if steps)
