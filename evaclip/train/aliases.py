"""The spellings of open_clip's and EVA-CLIP's training scripts, as ways to say configuration keys."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from evaclip.train.tree import Tree, nest


@dataclass(frozen=True)
class Alias:
    """One flag.

    Attributes:
        key: the configuration key that it sets; None for a flag that is accepted and has nothing to set.
        constant: what a flag without a value sets.
        words: their values that are called otherwise here.
        note: said when the flag is used.
    """

    flag: str
    key: str | None
    constant: Any = None
    words: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def takes_value(self) -> bool:
        return self.constant is None


_PRECISIONS = {
    "amp": "amp_fp16",
    "amp_bfloat16": "amp_bf16",
    "pure_bf16": "bf16",
    "pure_fp16": "fp16",
}
_EXACT = "the loss here is always that of the whole batch, exact, and without a matrix of the batch's size"

ALIASES = (
    Alias("--train-data", "data.train"),
    Alias("--data", "data.train"),
    Alias("--dataset-type", "data.kind"),
    Alias("--csv-img-key", "data.image_key"),
    Alias("--csv-caption-key", "data.caption_key"),
    Alias("--csv-separator", "data.csv_separator"),
    Alias("--workers", "data.workers"),
    Alias("--train-num-samples", "schedule.epoch_samples"),
    Alias("--epochs", "schedule.epochs"),
    Alias("--warmup", "schedule.warmup_steps"),
    Alias("--lr-scheduler", "schedule.name", words={"const": "constant"}),
    Alias("--batch-size", "batch_size"),
    Alias("--accum-freq", "accumulation"),
    Alias("--precision", "precision", words=_PRECISIONS),
    Alias("--model", "model.name"),
    Alias("--pretrained", "model.pretrained"),
    Alias("--pretrained-image", "model.pretrained_image"),
    Alias("--pretrained-text", "model.pretrained_text"),
    Alias("--force-patch-dropout", "model.patch_dropout"),
    Alias("--grad-checkpointing", "model.savings.recompute", constant="block"),
    Alias("--opt", "optim.name"),
    Alias("--lr", "optim.lr"),
    Alias("--visual-lr", "optim.visual.lr"),
    Alias("--text-lr", "optim.text.lr"),
    Alias("--visual-ld", "optim.visual.layer_decay"),
    Alias("--text-ld", "optim.text.layer_decay"),
    Alias("--beta1", "optim.beta1"),
    Alias("--beta2", "optim.beta2"),
    Alias("--eps", "optim.eps"),
    Alias("--wd", "optim.weight_decay"),
    Alias("--grad-clip-norm", "optim.grad_clip_norm"),
    Alias("--siglip", "loss.name", constant="siglip"),
    Alias("--local-loss", None, constant=True, note=_EXACT),
    Alias("--gather-with-grad", None, constant=True, note=_EXACT),
    Alias("--save-frequency", "checkpoint.every_epochs"),
    Alias("--log-every-n-steps", "log.every_steps"),
    Alias("--name", "name"),
    Alias("--logs", "output"),
    Alias("--seed", "seed"),
)


def changes(given: Mapping[str, Any], accumulation: int, processes: int) -> list[Tree]:
    """The configuration changes that flags ask for.

    Args:
        given: values by flag, True for a flag without one; of those that aren't given None, False or nothing.
        accumulation: of the configuration so far.
        processes: that train together.
    """
    found = []
    for alias in _used(given):
        if alias.key is None:
            continue
        value = given[alias.flag] if alias.takes_value else alias.constant
        if alias.key == "batch_size":
            # There it counts one chunk of one process, here the whole batch.
            value = _times(value, _times(given.get("--accum-freq") or accumulation, processes))
        found.append(nest(alias.key, alias.words.get(value, value)))
        if alias.key == "schedule.epochs":
            found.append(nest("schedule.steps", None))
    return found


def notes(given: Mapping[str, Any]) -> list[str]:
    """What is to be said about the given flags."""
    return [f"{alias.flag}: {alias.note}" for alias in _used(given) if alias.note]


def _times(value: Any, factor: Any) -> Any:
    """The product; what is not a number stays as it is, for the configuration to refuse."""
    numbers = all(str(number).lstrip("-").isdecimal() for number in (value, factor))
    return int(value) * int(factor) if numbers else value


def _used(given: Mapping[str, Any]) -> Iterable[Alias]:
    return (alias for alias in ALIASES if given.get(alias.flag) not in (None, False))
