"""The spellings of open_clip's and EVA-CLIP's training scripts, as ways to say configuration keys."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from evaclip.errors import UserError, unknown_name
from evaclip.model.config import find_model
from evaclip.train.tree import Tree, merge, nest


@dataclass(frozen=True)
class Alias:
    """One flag.

    Attributes:
        key: the configuration key that it sets; None for a flag that is accepted and has nothing to set.
        constant: what a flag without a value sets.
        words: their values that are called otherwise here.
        many: takes several values.
        read: turns its value into a change, where that is more than the one key.
        note: said when the flag is used.
        refused: why there is no such thing here, and what does it instead.
    """

    flag: str
    key: str | None = None
    constant: Any = None
    words: dict[str, Any] = field(default_factory=dict)
    many: bool = False
    read: Callable[[Any], Tree] | None = None
    note: str = ""
    refused: str = ""

    @property
    def takes_value(self) -> bool:
        return self.constant is None

    def change(self, given: Any) -> Tree:
        """What it changes, with the value that was given."""
        value = given if self.takes_value else self.constant
        if self.read is not None:
            return self.read(value)
        if self.key is None:
            return {}
        return nest(self.key, self.words.get(value, value) if isinstance(value, str) else value)


def _pretrained(value: str) -> Tree:
    """`SOURCE`, or `NAME:SOURCE` with the name of the model."""
    name, colon, source = value.partition(":")
    if colon and source and find_model(name):
        return {"model": {"name": name, "pretrained": source}}
    return nest("model.pretrained", value or None)


def _validation(value: str) -> Tree:
    """An evaluation set, so that no training data is held out."""
    return {"validation_split": None, **nest(f"{_VALIDATION}.data.train", value)}


def _imagenet(name: str) -> Callable[[str], Tree]:
    return lambda value: nest(f"eval.sets.{name}", {"data": {"train": value}, "classes": "imagenet"})


def _trackers(value: str) -> Tree:
    """`wandb`, `tensorboard`, both with a comma between them, `all`, or nothing."""
    names = [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        if name not in _TRACKERS:
            raise unknown_name("--report-to", name, _TRACKERS)
    every = "all" in names
    change = nest("log.tensorboard", every or "tensorboard" in names)
    if every or "wandb" in names:
        change = merge(change, nest("log.wandb.project", _PROJECT))
    return change


def _image_size(values: Sequence[str]) -> Tree:
    """One side, or height and width."""
    sizes = [int(value) if value.isdecimal() else value for value in values]
    return nest("model.options.vision.image_size", sizes[0] if len(sizes) == 1 else sizes)


def _whole_number(key: str) -> Callable[[str], Tree]:
    return lambda value: nest(key, int(value) if value.isdecimal() else value)


def _optimizer_options(values: Sequence[str]) -> Tree:
    """`KEY=VALUE ...`, with YAML values."""
    from evaclip.train.overrides import parse_assignment  # yaml belongs to the extra clip

    return reduce(merge, (parse_assignment(f"optim.options.{value}") for value in values), {})


def _refused(reason: str, *flags: str) -> list[Alias]:
    return [Alias(flag, refused=reason) for flag in flags]


_VALIDATION = "eval.sets.val"
_TRACKERS = ("tensorboard", "wandb", "all")
_PROJECT = "open-clip"
_PRECISIONS = {"amp": "amp_fp16", "amp_bfloat16": "amp_bf16", "pure_bf16": "bf16", "pure_fp16": "fp16"}
_NEVER = {"0": None}
_EXACT = "the loss here is always exact, over the whole batch, and without a matrix of the batch's size"
_NO_BATCH_NORM = "EVA-CLIP has no batch norm"
_NO_COCA = "there is no CoCa here"
_NO_DISTILLATION = "there is no distillation here"
_COOLDOWN = (
    "schedule={name: constant, cooldown_fraction: 0.2, cooldown: linear, final_factor: 0} is one of the last fifth of "
    "the steps"
)
_TORCHRUN = "torchrun starts the processes, and its --rdzv-endpoint and --rdzv-backend say where they meet"
_SYNC = "copy the run while it trains, as with aws s3 sync: its checkpoints appear whole or not at all"
_OF_EITHER_SET = ("--dataset-type", "--csv-img-key", "--csv-caption-key", "--csv-separator", "--max-image-pixels")

ALIASES = (
    Alias("--train-data", "data.train"),
    Alias("--data", "data.train"),
    Alias(
        "--train-data-upsampling-factors",
        refused="data.mixture={NAME: {train: PATH, weight: SHARE}, ...} mixes data sets in proportions",
    ),
    Alias("--val-data", f"{_VALIDATION}.data.train", read=_validation),
    Alias("--val-num-samples", f"{_VALIDATION}.samples"),
    Alias("--imagenet-val", "eval.sets.imagenet", read=_imagenet("imagenet")),
    Alias("--imagenet-v2", "eval.sets.imagenet_v2", read=_imagenet("imagenet_v2")),
    Alias("--val-frequency", "eval.every_epochs", words=_NEVER),
    Alias("--zeroshot-frequency", "eval.every_epochs", words=_NEVER),
    Alias(
        "--dataset-resampled", constant=True, note="each sample comes once an epoch; shards are shuffled every epoch"
    ),
    Alias("--dataset-type", "data.kind"),
    Alias("--csv-img-key", "data.image_key"),
    Alias("--csv-caption-key", "data.caption_key"),
    Alias("--csv-separator", "data.csv_separator"),
    Alias("--max-image-pixels", "data.max_image_pixels"),
    Alias("--workers", "data.workers"),
    Alias("--train-num-samples", "schedule.epoch_samples"),
    Alias("--epochs", "schedule.epochs"),
    Alias("--warmup", "schedule.warmup_steps"),
    Alias("--lr-scheduler", "schedule.name", words={"const": "constant"}),
    Alias("--skip-scheduler", "schedule.name", constant="constant", note="warm-up stays; --warmup 0 leaves it out too"),
    *_refused(_COOLDOWN, "--epochs-cooldown", "--lr-cooldown-end", "--lr-cooldown-power"),
    Alias("--batch-size", "batch_size"),
    Alias("--accum-freq", "accumulation_steps"),
    Alias("--precision", "precision", words=_PRECISIONS),
    Alias("--model", "model.name"),
    Alias("--pretrained", "model.pretrained", read=_pretrained),
    Alias("--pretrained-image", "model.pretrained_image"),
    Alias("--pretrained-text", "model.pretrained_text"),
    Alias("--lock-image", "model.lock_image", constant=True),
    Alias("--lock-image-unlocked-groups", "model.lock_image_unlocked_groups"),
    Alias("--lock-image-freeze-bn-stats", constant=True, note=_NO_BATCH_NORM),
    Alias("--lock-text", "model.lock_text", constant=True),
    Alias("--lock-text-unlocked-layers", "model.lock_text_unlocked_layers"),
    Alias("--lock-text-freeze-layer-norm", constant=True, note="the norms of locked layers are locked as well"),
    Alias("--force-patch-dropout", "model.patch_dropout"),
    Alias("--force-image-size", "model.options.vision.image_size", many=True, read=_image_size),
    Alias(
        "--force-context-length",
        "model.options.text.context_length",
        read=_whole_number("model.options.text.context_length"),
    ),
    Alias(
        "--force-quick-gelu",
        constant=True,
        refused="EVA-CLIP has exact GELU, and weights that were trained with QuickGELU don't fit",
    ),
    Alias("--force-custom-text", constant=True, note="the text tower is always a separate module"),
    Alias("--image-mean", "model.options.preprocess.mean", many=True),
    Alias("--image-std", "model.options.preprocess.std", many=True),
    Alias("--image-interpolation", "model.options.preprocess.interpolation"),
    Alias("--image-resize-mode", "model.options.preprocess.resize"),
    Alias(
        "--aug-cfg",
        many=True,
        refused="data.augmentation does it, such as --set 'data.augmentation={scale: [0.5, 1.0], grayscale: 0.1}'",
    ),
    Alias("--grad-checkpointing", "model.savings.recompute", constant="block"),
    Alias("--torchcompile", "compile", constant="blocks"),
    Alias("--torchscript", constant=True, refused="--torchcompile (compile=blocks) compiles the model"),
    Alias("--trace", constant=True, refused="evaclip export writes a trained model as a program"),
    Alias("--use-bn-sync", constant=True, note=_NO_BATCH_NORM),
    Alias("--use-bnb-linear", refused="there are no 8-bit layers here; precision=bf16 has 2 bytes a weight"),
    Alias("--opt", "optim.name", words={"timm/adamw": "adamw", "timm/lamb": "lamb"}),
    Alias("--opt-kwargs", "optim.options", many=True, read=_optimizer_options),
    Alias("--momentum", "optim.options.momentum", read=lambda value: _optimizer_options([f"momentum={value}"])),
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
    Alias("--loss-dist-impl", note=_EXACT),
    *_refused(_NO_COCA, "--coca-caption-loss-weight", "--coca-contrastive-loss-weight"),
    *_refused(_NO_DISTILLATION, "--distill-model", "--distill-pretrained"),
    Alias("--save-frequency", "checkpoint.every_epochs", words=_NEVER),
    Alias("--save-most-recent", constant=True, note="checkpoints/latest always names the newest"),
    Alias("--delete-previous-checkpoint", "checkpoint.keep", constant=1),
    *_refused(_SYNC, "--remote-sync", "--remote-sync-frequency", "--remote-sync-protocol"),
    Alias("--log-every-n-steps", "log.every_steps"),
    Alias("--log-local", constant=True, note="the first process logs for all"),
    Alias("--report-to", "log", read=_trackers),
    Alias("--wandb-project-name", "log.wandb.project"),
    Alias("--wandb-notes", refused="the environment variable WANDB_NOTES says it"),
    Alias(
        "--copy-codebase", constant=True, refused="RUN/config.yaml and RUN/events.jsonl hold configuration and versions"
    ),
    Alias("--cache-dir", refused="the environment variable HF_HOME says where downloads lie"),
    *_refused(_TORCHRUN, "--dist-url", "--dist-backend"),
    Alias("--horovod", constant=True, refused=_TORCHRUN),
    Alias(
        "--ddp-static-graph", constant=True, note="gradients are averaged while the backward pass goes on, without DDP"
    ),
    Alias("--no-set-device-rank", constant=True, refused="--device cuda:0 names the device of each process"),
    Alias("--name", "name"),
    Alias("--logs", "output"),
    Alias("--seed", "seed"),
)


def changes(given: Mapping[str, Any], accumulation_steps: int, processes: int) -> list[Tree]:
    """The configuration changes that flags ask for.

    Args:
        given: values by flag, True for a flag without a value; None, False or nothing for flags that aren't given.
        accumulation_steps: of the configuration so far.
        processes: that train together.

    Raises:
        UserError: a flag is refused, with the alternative; or two flags set one key to different values.
    """
    found = []
    first: dict[str, Alias] = {}
    for alias in _used(given):
        value = given[alias.flag]
        if alias.refused:
            raise UserError(f"{alias.flag} isn't taken here: {alias.refused}")
        if alias.key and alias.takes_value:
            other = first.setdefault(alias.key, alias)
            if given[other.flag] != value:
                raise UserError(
                    f"{other.flag} {given[other.flag]} and {alias.flag} {value} are one here, {alias.key}: give one"
                )
        if alias.key == "batch_size":
            # There it is the micro-batch of one rank, here the global batch.
            value = _times(value, _times(given.get("--accum-freq") or accumulation_steps, processes))
        found.append(alias.change(value))
        if alias.flag in _OF_EITHER_SET and given.get("--val-data"):
            found.append(nest(_VALIDATION, alias.change(value)))
    return found


def notes(given: Mapping[str, Any]) -> list[str]:
    """What is to be said about the given flags."""
    return [f"{alias.flag}: {alias.note}" for alias in _used(given) if alias.note]


def _times(value: Any, factor: Any) -> Any:
    """The product; other values stay, and the configuration refuses them."""
    numbers = all(str(number).lstrip("-").isdecimal() for number in (value, factor))
    return int(value) * int(factor) if numbers else value


def _used(given: Mapping[str, Any]) -> Iterable[Alias]:
    return (alias for alias in ALIASES if given.get(alias.flag) not in (None, False))
