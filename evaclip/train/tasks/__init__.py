"""What a run trains, one file a task."""

from pkgutil import resolve_name

from evaclip.train.tasks.task import Task

_CLASSES = {
    "contrastive": "contrastive:Contrastive",
    "classification": "classification:Classification",
    "masked_image": "masked_image:MaskedImage",
}
"""By `task.name` of a configuration; a class's module is imported where it is needed."""


def task_class(name: str) -> type[Task]:
    """The class of the task with this name."""
    found: type[Task] = resolve_name(f"{__name__}.{_CLASSES[name]}")
    return found
