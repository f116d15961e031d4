"""Progressive resolution: a run that begins with small images, as Perception Encoder's (Bolya et al. 2025)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from evaclip.data.config import DataConfig
from evaclip.data.loader import TrainLoader
from evaclip.train.config import ScheduleConfig
from evaclip.train.schedule import image_parts, image_size_at
from evaclip.train.tasks.task import Size, Task


@dataclass(frozen=True)
class Resolution:
    """Gives the model and the loader of a run the image size of a step."""

    task: Task
    loader: TrainLoader
    data: DataConfig
    schedule: ScheduleConfig
    total_steps: int

    def at(self, step: int) -> Size:
        """The image size of a step, counted from 0: at the end the model's own."""
        return image_size_at(step, self.total_steps, self.schedule) or self.task.visual.config.image_size

    def begin(self, step: int) -> None:
        """From now on the model takes, and the loader's next iterator gives, images of the size of this step."""
        size = self.at(step)
        self.task.visual.set_image_size(size)
        self.loader.set_transform(self.task.transform(self.data, size), self.task.targets(size))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the model takes images of its final size."""
        visual = self.task.visual
        size = visual.present.image_size
        visual.set_image_size(visual.config.image_size)
        try:
            yield
        finally:
            visual.set_image_size(size)

    def flops_per_sample(self, step: int) -> float:
        """Model FLOPs of a training step per sample, forward and backward."""
        return self.task.flops_per_sample(self.at(step))

    def flops_left(self, step: int) -> float:
        """The same of one sample in each of the steps from `step` to the end."""
        parts = [range(max(step, steps.start), steps.stop) for steps, _ in image_parts(self.total_steps, self.schedule)]
        return sum(len(steps) * self.flops_per_sample(steps.start) for steps in parts if steps)
