"""The one description of a training run: a tree of frozen dataclasses, checked by pydantic."""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from evaclip.data.config import DataConfig
from evaclip.model.config import Savings

Precision = Literal["fp32", "amp_bf16", "amp_fp16", "bf16", "fp16"]
Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Measure = Literal["classify", "retrieval", "loss", "linear_probe", "knn"]


TIMM = "timm/"
"""Prefix of the names of timm's optimizers."""


def _optimizer(name: str) -> str:
    if name not in ("adamw", "lamb") and not name.startswith(TIMM):
        raise ValueError("must be adamw, lamb or timm/NAME, such as timm/lion")
    return name


def _inside(name: str) -> str:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError("expected a folder inside of `output`; output=FOLDER puts runs elsewhere")
    return name


RunName = Annotated[str, AfterValidator(_inside)]
SetName = Annotated[str, Field(pattern=r"^[\w.-]+$")]

_STRICT_KEYS = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class ModelConfig:
    """Which model is trained, and from what weights it starts."""

    name: str = "EVA02-CLIP-B-16"
    pretrained: str | None = None
    """Weights of the whole model: a file, a checkpoint folder, `hf-hub:OWNER/NAME`, a tag; none: random ones."""
    pretrained_image: str | None = None
    """Weights that the image tower starts from, such as those of masked image modelling."""
    pretrained_text: str | None = None
    """Weights that the text tower starts from, of a CLIP model of any library."""
    patch_dropout: Share | None = None
    """Share of the patch tokens that are left out in training; none keeps the model's own value."""
    lock_image: bool = False
    """Train nothing of the image tower (LiT, Zhai et al. 2022, arXiv 2111.07991) but what the next key says."""
    lock_image_unlocked_groups: Annotated[int, Field(ge=0)] = 0
    """Groups of a locked tower that are trained all the same, from the output: the projection, the last block with the
    norm behind it, each block before it, the embeddings."""
    lock_text: bool = False
    lock_text_unlocked_layers: Annotated[int, Field(ge=0)] = 0
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the architecture that differ from the named model's, such as `vision: {drop_path: 0.1}`."""
    savings: Savings = Savings()
    """What the model leaves out, and computes again instead of keeping it; no result depends on it."""

    @model_validator(mode="after")
    def _whole_or_parts(self) -> Self:
        if self.pretrained and (self.pretrained_image or self.pretrained_text):
            raise ValueError("set either pretrained, for the whole model, or pretrained_image and pretrained_text")
        return self

    @model_validator(mode="after")
    def _unlocked_is_of_what_is_locked(self) -> Self:
        if self.lock_image_unlocked_groups and not self.lock_image:
            raise ValueError(f"lock_image_unlocked_groups={self.lock_image_unlocked_groups} needs lock_image=true")
        if self.lock_text_unlocked_layers and not self.lock_text:
            raise ValueError(f"lock_text_unlocked_layers={self.lock_text_unlocked_layers} needs lock_text=true")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class TowerConfig:
    """What differs between the towers; none takes the value of the whole optimizer."""

    lr: Rate | None = None
    weight_decay: Rate | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The learning rate falls by this factor with each block away from the output."""
    frozen_steps: Annotated[int, Field(ge=0)] = 0
    """So many steps at the beginning leave the tower's weights as they are: its rate is 0. Gradients are computed, and
    the optimizer's moments are warm when it ends; `model.lock_image` and `lock_text` spare that for a whole run."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class OptimConfig:
    """The optimizer; the moments' defaults are those of the released EVA-CLIP models."""

    name: Annotated[str, AfterValidator(_optimizer)] = "adamw"
    """adamw or lamb, or an optimizer of timm, such as timm/lion."""
    options: dict[str, Any] | None = None
    """Keyword arguments of timm's optimizer that have no key here, such as `caution: true`."""
    lr: Rate = 5e-4
    """Peak rate of whatever a tower does not override: logit_scale, and towers without a rate."""
    beta1: Share = 0.9
    beta2: Share = 0.98
    eps: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Rate = 0.05
    visual: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig()
    grad_clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Bound on the L2 norm of all gradients together."""
    stochastic_rounding: bool = False
    """Under precision=bf16 round updated weights up or down at random, so that steps below half a unit of bfloat16 add
    up; there are no float32 copies. Nothing but `seed` decides: neither threads nor processes."""

    @model_validator(mode="after")
    def _options_fit_the_optimizer(self) -> Self:
        is_timms = self.name.startswith(TIMM)
        if self.options and not is_timms:
            raise ValueError(f"options={self.options} needs name=timm/NAME, got name={self.name}")
        if self.stochastic_rounding and is_timms:
            raise ValueError(f"stochastic_rounding needs name=adamw or name=lamb, got name={self.name}")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class ResolutionConfig:
    """A part of the run with another image size than the model's."""

    image_size: Count
    """Side of the images in pixels, a multiple of the patches' side."""
    steps: Count | None = None
    """How many steps the part takes."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The same as a share of all steps."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.share is None):
            raise ValueError(f"set either steps or share, got steps={self.steps} and share={self.share}")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class ScheduleConfig:
    """How long the run is, and the course of learning rate and image size over it."""

    name: Literal["cosine", "constant"] = "cosine"
    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    epoch_samples: Count | None = None
    """Samples that make one epoch; none takes the size of the data."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_share: Share | None = None
    """Share of all steps that is warm-up, in the place of `warmup_steps`."""
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the peak rate at which the cosine or the cooldown ends."""
    cooldown_steps: Annotated[int, Field(ge=0)] = 0
    """Last steps of a constant schedule in which the rate falls: warm-up, stable, decay (WSD)."""
    cooldown_share: Share | None = None
    """Share of all steps that is cooldown, in the place of `cooldown_steps`."""
    cooldown: Literal["linear", "1-sqrt"] = "1-sqrt"
    """How it falls: in proportion, or by the square root of the cooldown's part that is done."""
    resolutions: tuple[ResolutionConfig, ...] = ()
    """Parts that the run begins with, one after the other; the rest of it has the model's own image size."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"set either steps or epochs, and the other to null, got steps={self.steps} and epochs={self.epochs}"
            )
        return self

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_share is not None and self.warmup_steps:
            raise ValueError(
                "set either warmup_steps or warmup_share, and the other to null, "
                f"got warmup_steps={self.warmup_steps} and warmup_share={self.warmup_share}"
            )
        return self

    @model_validator(mode="after")
    def _one_cooldown(self) -> Self:
        given = f"got cooldown_steps={self.cooldown_steps} and cooldown_share={self.cooldown_share}"
        if self.cooldown_share and self.cooldown_steps:
            raise ValueError(f"set either cooldown_steps or cooldown_share, and the other to null, {given}")
        if self.name != "constant" and (self.cooldown_share or self.cooldown_steps):
            raise ValueError(f"a cooldown needs name=constant; {self.name} falls all the time; {given}")
        return self

    @model_validator(mode="after")
    def _ends_with_the_models_size(self) -> Self:
        shares = [part.share or 0.0 for part in self.resolutions]
        if sum(shares) >= 1:
            raise ValueError(f"the shares of resolutions leave nothing for the model's own image size: {shares}")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class LossConfig:
    """The contrastive loss over the whole batch of all processes."""

    name: Literal["clip", "siglip"] = "clip"
    label_smoothing: Share = 0.0
    products: Literal["ieee", "tf32x3"] = "tf32x3"
    """How a GPU multiplies float32 features: `tf32x3` on tensor cores as sums of three TF32 products, with about the
    error of float32; `ieee` without tensor cores."""

    @model_validator(mode="after")
    def _smoothing_needs_softmax(self) -> Self:
        if self.name == "siglip" and self.label_smoothing:
            raise ValueError(f"label_smoothing={self.label_smoothing} needs name=clip; siglip accepts only 0")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class ContrastiveTask:
    """Images and texts of pairs are made alike, and unlike those of all other pairs: see `loss`."""

    name: Literal["contrastive"] = "contrastive"


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class ClassificationTask:
    """Image classification: the mean of the patches or the class token, a linear layer, and cross-entropy. timm
    augments and mixes the images; it uses `scale` and `ratio` of `data.augmentation`."""

    name: Literal["classification"] = "classification"
    classes: Count | str | tuple[str, ...] | None = None
    """How many there are; or their names in the order of the labels: `imagenet`, a file with one a line, or a list.
    None: those of the class folders. Captions are names of classes, or their numbers from 0 as `cls` members hold
    them."""
    label_smoothing: Share = 0.1
    """Share of a label that all classes have in equal parts."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """A policy of timm, such as RandAugment's; none has no policy."""
    color_jitter: Rate = 0.4
    """Largest change of brightness, contrast and saturation; as in timm, where there is no policy."""
    flip: Probability = 0.5
    """How likely a picture is mirrored."""
    random_erasing: Probability = 0.0
    """How likely rectangles of a picture are erased."""
    erasing_mode: Literal["pixel", "rand", "const"] = "pixel"
    """What is there then: noise, a colour of noise, or the mean colour."""
    erasing_count: Count = 1
    """Rectangles at most."""
    mixup: Rate = 0.0
    """Both parameters of the beta distribution that mixup's shares are drawn from; 0 does no mixup."""
    cutmix: Rate = 0.0
    """The same of CutMix."""
    mix_prob: Probability = 1.0
    """How likely pictures are mixed at all, where mixup or CutMix is on."""
    switch_prob: Probability = 0.5
    """How likely it is CutMix that mixes them, where both are on."""
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    """What shares a draw: all pictures of a batch, both of a pair, or none. Partners are rows 2n and 2n + 1 of the
    batch of all processes."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class TeacherConfig:
    """Whose features of patches are predicted; a frozen image tower."""

    name: str = "EVA01-CLIP-g-14"
    """Of any CLIP, or timm's name of an image model."""
    pretrained: str | None = None
    """Its weights, as `model.pretrained` is given; none: random ones, which the run says."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of its architecture that differ from the named model's."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of its parameters and features; none: the 16-bit type of the run's `precision`, if it has one."""
    shard: bool = False
    """Shard it over the ranks as the model; needs `parallel.mode` shard or hybrid. False: every rank has it whole."""
    cache: str | None = None
    """A folder that keeps its features for views that come again: in later epochs where `data.augmentation` draws none
    at random, and in later runs of the same `seed`, data and image size."""
    cache_leaves_gb: Annotated[float, Field(ge=0)] = 10.0
    """What stays free of the disk: with less than this nothing more is kept."""

    @model_validator(mode="after")
    def _each_process_by_itself(self) -> Self:
        if self.cache and self.shard:
            raise ValueError("a sharded teacher takes all processes at once and can't be cached: set shard=false")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class MaskedImageTask:
    """An image model predicts a teacher's features of masked patches (EVA-02, Fang et al. 2023, arXiv 2303.11331)."""

    name: Literal["masked_image"] = "masked_image"
    teacher: TeacherConfig = TeacherConfig()
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of the patches that is masked, in blocks."""
    smallest_block: Count = 16
    """Patches of the smallest block, while there is room."""
    masked: Literal["compute", "drop"] = "compute"
    """compute: the mask token takes the place of masked patches in front of the first block, as in EVA. drop: behind
    the last one, in front of `decoder_layers` more, as in MAE (He et al. 2022, arXiv 2111.06377)."""
    decoder_layers: Count = 1
    """Blocks that see all patches under drop."""
    patch_gradient: Probability = 1.0
    """Factor of the gradient that reaches the patch embedding."""


TaskConfig = Annotated[ContrastiveTask | ClassificationTask | MaskedImageTask, Field(discriminator="name")]
"""Told apart by their `name`."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class NonfiniteConfig:
    """What happens when the loss or a gradient is not a number."""

    max_skipped: Count = 20
    """Steps in a row that may be skipped before `action` is taken."""
    action: Literal["stop", "rollback"] = "stop"
    """Stop with an error, or return to the last good checkpoint and leave the bad stretch of data out."""
    max_rollbacks: Count = 3
    """Returns to a checkpoint that one process of a run makes, for spikes too."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class SpikeConfig:
    """Return to the last good checkpoint when the loss jumps, and leave the data of the jump out."""

    deviations: Annotated[float, Field(gt=0)] | None = None
    """Standard deviations above the median that are still ordinary, such as 8; none looks for no spikes."""
    patience: Count = 3
    """Logged records in a row that make a spike."""
    window: Count = 50
    """Logged records that the loss is compared with."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class WatchdogConfig:
    """What happens when a process fetches data, makes a step or saves for too long."""

    seconds: Annotated[float, Field(gt=0)] | None = 1800.0
    """Then it says so, with the stacks of its threads; none never does."""
    abort: bool | None = None
    """And ends, so that torchrun starts all processes anew; none: only under torchrun, and only while steps follow one
    another, as a first step, an evaluation and a checkpoint may take long."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class ParallelConfig:
    """What the processes of a run share among them; no result depends on it by more than rounding."""

    mode: Literal["replicate", "shard", "hybrid"] = "replicate"
    """replicate: each has everything; shard: parameters, gradients and moments are cut over all; hybrid: over groups
    of `shard_size`, which hold copies of each other."""
    shard_size: Count | None = None
    """Processes that share one copy under hybrid, such as those of one node."""
    reshard: bool = True
    """Gather a block's parameters once more for the backward pass (ZeRO-3) instead of keeping them (ZeRO-2)."""
    accumulate: Literal["whole", "shards"] = "whole"
    """Gradients that micro-batches add up under shard and hybrid. whole: every rank keeps whole gradients, in
    float32 under amp_*, and reduces them once per step; shards: its shard, reduced after every micro-batch."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: a rank's parameters, gradients and moments stay in host memory, and the optimizer runs there. A GPU has a
    copy of a block's parameters while it computes with them. On a CPU there is nothing to move."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 120.0
    """A process waits so long for another one, which opens a cold index or compiles, before the run fails; that one has
    died is noticed at once. Between one step and the next it is 1.2 times `watchdog.seconds`, if less."""
    saving_timeout_minutes: Annotated[float, Field(gt=0)] = 1440.0
    """And so long for one that writes its part of a checkpoint, before the run goes on without that checkpoint."""

    @model_validator(mode="after")
    def _offload_is_of_shards(self) -> Self:
        if self.offload != "none" and self.mode == "replicate":
            raise ValueError(f"offload={self.offload} needs mode=shard or hybrid, with any number of processes")
        return self

    @model_validator(mode="after")
    def _size_is_for_hybrid(self) -> Self:
        if (self.shard_size is not None) != (self.mode == "hybrid"):
            raise ValueError(
                f"mode=hybrid needs a shard_size and no other mode has one, "
                f"got mode={self.mode} and shard_size={self.shard_size}"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class CheckpointConfig:
    """When checkpoints are written and how many stay. The last step always writes one."""

    every_steps: Count | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    every_epochs: Count | None = None
    keep: Count = 3
    keep_every: Count | None = None
    """Checkpoints at multiples of this step are never deleted."""
    background: bool = True
    """Write from a copy in host memory, while the training goes on."""
    allow_data_change: bool = False
    """Resume although the data is no longer what the checkpoint was trained on."""
    allow_teacher_change: bool = False
    """Resume although the teacher isn't the one that the checkpoint was trained with (`task.name=masked_image`)."""
    allow_schedule_change: bool = False
    """Resume although steps that are done would have had another rate or image size."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class WandbConfig:
    """A run of Weights & Biases (extra `wandb`), under the run's own name."""

    project: str
    entity: str | None = None
    mode: Literal["online", "offline"] | None = None
    """none: what the variable WANDB_MODE says, or else online."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class LogConfig:
    """What is reported while training."""

    every_steps: Count = 10
    tensorboard: bool = True
    wandb: WandbConfig | None = None
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """auto: a live display on a terminal, plain lines elsewhere."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class EvalSetConfig:
    """One set that the model is measured on."""

    data: DataConfig | None = None
    """Where it is; none: the held-out samples. Of class folders the captions are the classes' names, and
    `caption_template` is the prompt."""
    measure: tuple[Measure, ...] | None = None
    """classify: zero-shot accuracy; retrieval: recall of captions by picture and the other way round; loss: the
    contrastive loss of all pairs at once. None: all three, but classify alone where captions are names of classes.

    With task.name=masked_image linear_probe and knn, accuracies by what frozen features of `fit` teach, and loss, with
    every second patch masked; None: knn where there is a `fit`, else loss. A linear probe must be asked for: one
    process fits it, for hours on a large `fit`, while the others wait."""
    fit: DataConfig | None = None
    """Labelled pictures that linear_probe and knn learn from."""
    classes: str | tuple[str, ...] | None = None
    """Names of the classes in the order of the labels: `imagenet`, a file with one a line, or a list; none: those of
    the class folders, or else the distinct captions. Captions are names of classes, or their numbers from 0."""
    templates: str | tuple[str, ...] | None = None
    """Prompts with {} for the class; their embeddings are averaged: `imagenet`, a file, one or a list; none: the 80 of
    ImageNet for its classes, else the name alone."""
    first: Annotated[int, Field(ge=0)] = 0
    """Samples of the set that are left out before the first one used."""
    samples: Count | None = None
    """How many are used; none uses all."""
    allow_unreadable: bool = False
    """Evaluate the readable samples even if more than `data.max_bad_share` of the samples cannot be read."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class EvalConfig:
    """What a model in training is measured on, and when."""

    sets: dict[SetName, EvalSetConfig | None] | None = None
    """Sets by name; null leaves a set out, or all. The validation split of the training data is the set `held_out`."""
    every_steps: Count | None = None
    """Also evaluate while training; the end of the run always does."""
    every_epochs: Count | None = None
    """Also evaluate at the end of these epochs."""
    batch_size: Count = 64


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class TrainConfig:
    """A whole run."""

    name: RunName
    """The run's folder inside `output`."""
    batch_size: Count
    """Samples of one optimizer step, over all processes: the contrastive batch."""
    data: DataConfig
    held_out: Share | None = None
    """Share of the data, at most 5,000 samples, that training never sees and that is evaluated; `seed` decides which.
    None and 0 hold out nothing."""
    schedule: ScheduleConfig
    output: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"
    precision: Precision = "fp32"
    """amp_*: parameters in fp32, autocast to the 16-bit type; bf16, fp16: parameters themselves in 16 bits."""
    accumulation: Count = 1
    """Micro-batches per step and rank, with one exact loss over the global batch."""
    compile: Literal["none", "blocks"] = "none"
    """blocks: every block of both towers goes through torch.compile."""
    parallel: ParallelConfig = ParallelConfig()
    task: TaskConfig = ContrastiveTask()
    """What the model learns."""
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    ema_decay: Share | None = None
    """Keep a moving average of the weights, and evaluate it; none keeps none."""
    collect_every: Count | None = 50
    """Steps from one run of Python's garbage collector to the next, in all processes after the same one: where each has
    its pauses by itself, all wait for every one of them. none leaves it to Python."""
    nonfinite: NonfiniteConfig = NonfiniteConfig()
    spikes: SpikeConfig = SpikeConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _no_micro_batch_is_empty(self) -> Self:
        if self.batch_size < self.accumulation:
            raise ValueError(f"batch_size={self.batch_size} is less than accumulation={self.accumulation}")
        return self

    @model_validator(mode="after")
    def _timms_optimizers_update_float32(self) -> Self:
        if self.optim.name.startswith(TIMM) and self.precision in ("bf16", "fp16"):
            raise ValueError(
                f"optim.name={self.optim.name} needs precision=fp32, amp_bf16 or amp_fp16, "
                f"got precision={self.precision}"
            )
        return self

    @model_validator(mode="after")
    def _stochastic_rounding_is_to_bfloat16(self) -> Self:
        if self.optim.stochastic_rounding and self.precision != "bf16":
            raise ValueError(f"optim.stochastic_rounding needs precision=bf16, got precision={self.precision}")
        return self


ADAPTER: TypeAdapter[TrainConfig] = TypeAdapter(TrainConfig)

_NOT_THE_RESULT = (
    "collect_every",
    "name",
    "output",
    "device",
    "parallel",
    "log",
    "checkpoint",
    "eval",
    "nonfinite",
    "spikes",
    "watchdog",
)


def to_tree(config: TrainConfig) -> dict[str, Any]:
    """Nested dicts and lists, as YAML and JSON hold them."""
    tree: dict[str, Any] = ADAPTER.dump_python(config, mode="json")
    return tree


def training_tree(config: TrainConfig) -> dict[str, Any]:
    """The part of the configuration that decides what weights come out."""
    tree = {key: value for key, value in to_tree(config).items() if key not in _NOT_THE_RESULT}
    del tree["data"]["max_bad_share"]
    if isinstance(config.task, MaskedImageTask):
        for key in ("cache", "cache_leaves_gb", "shard"):
            del tree["task"]["teacher"][key]
    return tree


def config_hash(config: TrainConfig) -> str:
    """Equal for two configurations exactly when they train the same weights."""
    return hashlib.sha256(json.dumps(training_tree(config), sort_keys=True).encode()).hexdigest()[:16]


def process_count() -> int:
    """Processes that torchrun started, this one included; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))
