"""The configuration of a training run: a tree of frozen dataclasses, checked by pydantic."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from evaclip.data.config import DataConfig
from evaclip.model.config import Savings

Precision = Literal["fp32", "amp_bf16", "amp_fp16", "bf16", "fp16"]
SIXTEEN_BITS: tuple[Precision, ...] = ("bf16", "fp16")
"""Precisions whose matrices are stored in 16 bits."""
Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Metric = Literal["classify", "retrieval", "loss", "linear_probe", "knn"]


TIMM = "timm/"
"""Prefix of the names of timm's optimizers."""


def _steps(steps: tuple[int, int]) -> tuple[int, int]:
    if steps[0] > steps[1]:
        raise ValueError(f"must be the first and the last step, got {list(steps)}")
    return steps


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
    """The model and its initial weights."""

    name: str = "EVA02-CLIP-B-16"
    pretrained: str | None = None
    """Weights of the whole model: a file, a checkpoint folder, `hf-hub:OWNER/NAME`, a tag; none: random ones."""
    pretrained_image: str | None = None
    """Initial weights of the image tower, such as those of masked image modelling."""
    pretrained_text: str | None = None
    """Initial weights of the text tower, of a CLIP model of any library."""
    patch_dropout: Fraction | None = None
    """Fraction of patches dropped in training; none keeps the model's own value."""
    lock_image: bool = False
    """Freeze the image tower (LiT, Zhai et al. 2022, arXiv 2111.07991) except for the unlocked groups."""
    lock_image_unlocked_groups: Annotated[int, Field(ge=0)] = 0
    """Groups of a locked tower that are trained, counted from the output: the projection, the last block with the norm
    after it, each block before it, the embeddings."""
    lock_text: bool = False
    lock_text_unlocked_layers: Annotated[int, Field(ge=0)] = 0
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the architecture that differ from the named model's, such as `vision: {drop_path: 0.1}`."""
    savings: Savings = Savings()
    """Memory options: padding that is skipped, activation checkpointing. No result depends on them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pretrained and (self.pretrained_image or self.pretrained_text):
            raise ValueError("set either pretrained, for the whole model, or pretrained_image and pretrained_text")
        if self.lock_image_unlocked_groups and not self.lock_image:
            raise ValueError(f"lock_image_unlocked_groups={self.lock_image_unlocked_groups} needs lock_image=true")
        if self.lock_text_unlocked_layers and not self.lock_text:
            raise ValueError(f"lock_text_unlocked_layers={self.lock_text_unlocked_layers} needs lock_text=true")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class TowerConfig:
    """Options of one tower; none takes the optimizer's value."""

    lr: Rate | None = None
    weight_decay: Rate | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The learning rate falls by this factor with each block away from the output."""
    frozen_steps: Annotated[int, Field(ge=0)] = 0
    """First steps with a rate of 0. Gradients are computed, so the moments are warm afterwards; `model.lock_image` and
    `lock_text` skip that for a whole run."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class OptimConfig:
    """The optimizer; the moments' defaults are those of the released EVA-CLIP models."""

    name: Annotated[str, AfterValidator(_optimizer)] = "adamw"
    """adamw or lamb, or an optimizer of timm, such as timm/lion."""
    options: dict[str, Any] | None = None
    """Keyword arguments of timm's optimizer that have no key here, such as `caution: true`."""
    lr: Rate = 5e-4
    """Peak rate of towers without a rate, and of parameters outside the towers, such as logit_scale."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.98
    eps: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Rate = 0.05
    visual: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig()
    grad_clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Maximum L2 norm of all gradients together; none doesn't clip."""
    stochastic_rounding: bool = False
    """Under precision=bf16 round updated weights up or down at random, so that small updates add up without float32
    copies. The random bits depend on `seed`, not on threads or ranks."""

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
    """A phase of the run with another image size than the model's."""

    image_size: Count
    """Side of the images in pixels, a multiple of the patches' side."""
    steps: Count | None = None
    """Length of the phase."""
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Length as a fraction of all steps."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.fraction is None):
            raise ValueError(f"set either steps or fraction, got steps={self.steps} and fraction={self.fraction}")
        return self


ALTERNATIVES = (("steps", "epochs"), ("warmup_steps", "warmup_fraction"), ("cooldown_steps", "cooldown_fraction"))
"""Keys of `schedule` of which only one is set."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class ScheduleConfig:
    """Length of the run, learning rate and image size over the steps."""

    name: Literal["cosine", "constant"] = "cosine"
    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    epoch_samples: Count | None = None
    """Samples that make one epoch; none takes the size of the data."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_fraction: Fraction | None = None
    """Warm-up as a fraction of all steps, instead of `warmup_steps`."""
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end of the cosine or the cooldown, as a fraction of the peak rate."""
    cooldown_steps: Annotated[int, Field(ge=0)] = 0
    """Last steps of a constant schedule in which the rate falls: warm-up, stable, decay (WSD)."""
    cooldown_fraction: Fraction | None = None
    """Cooldown as a fraction of all steps, instead of `cooldown_steps`."""
    cooldown: Literal["linear", "1-sqrt"] = "1-sqrt"
    """Shape of the cooldown over its progress p: 1 - p, or 1 - sqrt(p)."""
    resolutions: tuple[ResolutionConfig, ...] = ()
    """First phases of the run, in order; the rest of the run has the model's image size."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, alternative in ALTERNATIVES:
            one, other = getattr(self, name), getattr(self, alternative)
            if (one and other is not None) or (name == "steps" and one is None and other is None):
                values = f"got {name}={one} and {alternative}={other}"
                raise ValueError(f"set either {name} or {alternative}, and the other to null, {values}")
        if self.name != "constant" and (self.cooldown_fraction or self.cooldown_steps):
            raise ValueError(f"cooldown_steps and cooldown_fraction need name=constant, got name={self.name}")
        fractions = [phase.fraction or 0.0 for phase in self.resolutions]
        if sum(fractions) >= 1:
            raise ValueError(f"the fractions of resolutions must be less than 1 together, got {fractions}")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class LossConfig:
    """The contrastive loss over the global batch."""

    name: Literal["clip", "siglip"] = "clip"
    label_smoothing: Fraction = 0.0

    @model_validator(mode="after")
    def _smoothing_needs_softmax(self) -> Self:
        if self.name == "siglip" and self.label_smoothing:
            raise ValueError(f"label_smoothing={self.label_smoothing} needs name=clip; siglip accepts only 0")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class ContrastiveTask:
    """Contrastive training of images and captions, see `loss`."""

    name: Literal["contrastive"] = "contrastive"


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class ClassificationTask:
    """Image classification: mean of the patches or class token, a linear layer, cross-entropy. timm augments and mixes
    the images; of `data.augmentation` only `scale` and `ratio` apply."""

    name: Literal["classification"] = "classification"
    classes: Count | str | tuple[str, ...] | None = None
    """Number of classes, or their names in the order of the labels: `imagenet`, a file with one name a line, a list.
    None: the class folders. Captions are names of classes, or their numbers from 0 as in `cls` members."""
    label_smoothing: Fraction = 0.1
    """Fraction of a label that is spread evenly over all classes."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """An augmentation policy of timm, such as RandAugment; none uses no policy."""
    color_jitter: Rate = 0.4
    """Maximum change of brightness, contrast and saturation; as in timm, only without a policy."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    random_erasing: Probability = 0.0
    """Probability that a rectangle of an image is replaced by noise."""
    mixup: Rate = 0.0
    """Both parameters of the beta distribution of mixup's weights; 0 disables mixup."""
    cutmix: Rate = 0.0
    """Both parameters of the beta distribution of CutMix's areas; 0 disables CutMix."""
    mix_prob: Probability = 1.0
    """Probability that images are mixed, if mixup or CutMix is on."""
    switch_prob: Probability = 0.5
    """Probability of CutMix instead of mixup, if both are on."""
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    """Images with the same random numbers: a whole batch, a pair, or single images. Rows 2n and 2n + 1 of the global
    batch are mixed with each other."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class TeacherConfig:
    """The frozen image tower that gives the features to predict."""

    name: str = "EVA01-CLIP-g-14"
    """Name of a CLIP, or timm's name of an image model."""
    pretrained: str | None = None
    """Its weights, given as in `model.pretrained`; none: random ones, with a warning."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the architecture that differ from the named model's."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of its parameters and activations; none: the 16-bit type of the run's `precision`, if any."""
    shard: bool = False
    """Shard it as `parallel` says, with mode shard or hybrid; else each rank holds it whole."""
    cache: str | None = None
    """Folder that stores its features of views that occur again: in later epochs without random augmentation, and in
    later runs with the same `seed`, data and image size."""
    cache_leaves_gb: Annotated[float, Field(ge=0)] = 10.0
    """Disk space in 10^9 bytes that stays free: with less, no more features are stored."""

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
    """Fraction of the patches that is masked, in blocks."""
    smallest_block: Count = 16
    """Minimum patches of a block, while there is room."""
    masked: Literal["compute", "drop"] = "compute"
    """compute: mask tokens replace masked patches before the first block, as in EVA. drop: after the last block, before
    `decoder_layers` more blocks, as in MAE (He et al. 2022, arXiv 2111.06377)."""
    decoder_layers: Count = 1
    """Blocks of the decoder, under drop."""
    patch_gradient: Probability = 1.0
    """Factor of the gradient that reaches the patch embedding."""


TaskConfig = Annotated[ContrastiveTask | ClassificationTask | MaskedImageTask, Field(discriminator="name")]
"""Told apart by their `name`."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class NonfiniteConfig:
    """Reaction to a loss or gradient that is not finite."""

    max_skipped: Count = 20
    """Skipped steps in a row that trigger `action`."""
    action: Literal["stop", "rollback"] = "stop"
    """Stop with an error, or return to the last good checkpoint and leave out the data since then."""
    max_rollbacks: Count = 3
    """Maximum returns to a checkpoint in one start of the run, after loss spikes too."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class SpikeConfig:
    """Return to the last good checkpoint when the loss jumps, and leave out the data since then."""

    threshold_sigma: Annotated[float, Field(gt=0)] | None = None
    """Standard deviations above the median that make a loss a spike, such as 8; none disables the detection."""
    patience: Count = 3
    """Logged losses in a row above the threshold that make a spike."""
    window: Count = 50
    """Logged losses before, with which a loss is compared."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class WatchdogConfig:
    """Reaction to a rank that fetches data, computes a step or saves for too long."""

    seconds: Annotated[float, Field(gt=0)] | None = 600.0
    """Time after which a rank prints the stacks of its threads; between two steps it is at least 20 median steps, while
    saving `parallel.saving_timeout_minutes`. None never does."""
    abort: bool | None = None
    """Also end the rank, with exit status 75, so that all ranks are restarted; none: under torchrun and srun, between
    two steps and while saving, as a first step and an evaluation may take long."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class ParallelConfig:
    """How ranks share the model; results depend on it only by rounding.

    Under amp_* the modes shard and hybrid round more than replicate: FSDP casts whole towers, norms and the residual
    stream included, where autocast keeps these in float32.
    """

    mode: Literal["replicate", "shard", "hybrid"] = "replicate"
    """replicate: each rank holds everything; shard: parameters, gradients and moments are sharded over all ranks;
    hybrid: over groups of `shard_size` ranks, which are replicas of each other."""
    shard_size: Count | None = None
    """Ranks that share one replica under hybrid, such as the ranks of a node."""
    reshard_after_forward: bool = True
    """Gather a block's parameters again for the backward pass (ZeRO-3) instead of keeping them (ZeRO-2)."""
    accumulate: Literal["whole", "shards"] = "whole"
    """Gradients that micro-batches add up under shard and hybrid. whole: every rank keeps whole gradients, in
    float32 under amp_*, and reduces them once per step; shards: its shard, reduced after every micro-batch."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: parameters, gradients and moments are in host memory, where the optimizer runs; a GPU holds a block's
    parameters while it computes with them. No effect on a CPU."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 120.0
    """Maximum wait for another rank, which opens a cold index or compiles; a rank that died is noticed at once, and
    `watchdog` ends a rank that hangs between two steps."""
    saving_timeout_minutes: Annotated[float, Field(gt=0)] = 60.0
    """Maximum wait for a rank that writes its shards of a checkpoint; then the run goes on without that checkpoint. At
    the next one `watchdog` ends a rank that still writes after as long a wait."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.offload != "none" and self.mode == "replicate":
            raise ValueError(f"offload={self.offload} needs mode=shard or hybrid, with any number of processes")
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
    allow_data_change: bool = False
    """Resume although the data differs from the checkpoint's."""
    allow_teacher_change: bool = False
    """Resume although the teacher differs from the checkpoint's (`task.name=masked_image`)."""
    allow_schedule_change: bool = False
    """Resume although past steps would have had another rate or image size."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class WandbConfig:
    """A run of Weights & Biases (extra `wandb`) under the run's name; WANDB_ENTITY and WANDB_MODE apply."""

    project: str


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class LogConfig:
    """Logs of the training."""

    every_steps: Count = 10
    tensorboard: bool = True
    wandb: WandbConfig | None = None
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """auto: a live display on a terminal, plain lines elsewhere."""
    profile_steps: Annotated[tuple[Count, Count], AfterValidator(_steps)] | None = None
    """First and last step that torch's profiler records on each rank, into RUN/traces/rank_N.json."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class EvalSetConfig:
    """One evaluation set."""

    data: DataConfig | None = None
    """Its samples; none: the validation split. For class folders, captions are the classes' names and
    `caption_template` is the prompt."""
    metrics: tuple[Metric, ...] | None = None
    """classify: zero-shot accuracy; retrieval: recall of captions by image and of images by caption; loss: the
    contrastive loss of all pairs at once. None: all three, but only classify if captions are names of classes.

    With task.name=masked_image: linear_probe and knn, accuracies of probes on frozen features of `fit`, and loss, with
    every second patch masked; None: knn with a `fit`, else loss. One rank fits a linear probe while the others wait,
    which takes hours on a large `fit`."""
    fit: DataConfig | None = None
    """Labelled images to which linear_probe and knn are fitted."""
    classes: str | tuple[str, ...] | None = None
    """Names of the classes in the order of the labels: `imagenet`, a file with one name a line, or a list; none: the
    class folders, or else the distinct captions. Captions are names of classes, or their numbers from 0."""
    templates: str | tuple[str, ...] | None = None
    """Prompts with {} for the class; their embeddings are averaged: `imagenet`, a file, one or a list; none: ImageNet's
    80 with its classes, else the name alone."""
    skip: Annotated[int, Field(ge=0)] = 0
    """Samples left out at the beginning."""
    samples: Count | None = None
    """Number of samples; none uses all."""
    allow_unreadable: bool = False
    """Evaluate the readable samples even if more than `data.max_bad_fraction` of the samples cannot be read."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class EvalConfig:
    """Evaluation of the model in training."""

    sets: dict[SetName, EvalSetConfig | None] | None = None
    """Sets by name; null removes a set, or all. The validation split is the set `held_out`."""
    every_steps: Count | None = None
    """Also evaluate after these steps; the end of the run is always evaluated."""
    every_epochs: Count | None = None
    """Also evaluate at the end of these epochs."""
    batch_size: Count = 64


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class TrainConfig:
    """A whole run."""

    name: RunName
    """The run's folder inside `output`."""
    batch_size: Count
    """Global batch size: samples of one optimizer step over all ranks."""
    data: DataConfig
    validation_split: Fraction | None = None
    """Fraction of the data, at most 5,000 samples, that is evaluated and never trained on; `seed` decides which. None
    and 0 hold out nothing."""
    schedule: ScheduleConfig
    output: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"
    precision: Precision = "fp32"
    """amp_*: parameters in fp32, autocast to the 16-bit type; bf16, fp16: matrices themselves in 16 bits, and norms,
    biases, logit_scale and logit_bias in fp32."""
    accumulation_steps: Count = 1
    """Micro-batches per step and rank, with one exact loss over the global batch."""
    compile: Literal["none", "blocks"] = "none"
    """blocks: torch.compile every block of both towers."""
    parallel: ParallelConfig = ParallelConfig()
    task: TaskConfig = ContrastiveTask()
    """The training task."""
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    ema_decay: Fraction | None = None
    """Decay of a moving average of the weights, which is evaluated; none has no average."""
    gc_every_steps: Count | None = 50
    """Steps between runs of Python's garbage collector, at the same steps on all ranks, as all wait for the slowest;
    none leaves it to Python."""
    nonfinite: NonfiniteConfig = NonfiniteConfig()
    spikes: SpikeConfig = SpikeConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size < self.accumulation_steps:
            raise ValueError(f"batch_size={self.batch_size} is less than accumulation_steps={self.accumulation_steps}")
        if self.optim.name.startswith(TIMM) and self.precision in SIXTEEN_BITS:
            raise ValueError(
                f"optim.name={self.optim.name} needs precision=fp32, amp_bf16 or amp_fp16, "
                f"got precision={self.precision}"
            )
        if self.data.resize and self.task.name != "contrastive":
            raise ValueError(f"data.resize must be null with task.name={self.task.name}, got {self.data.resize}")
        if self.data.max_patches and self.schedule.resolutions:
            raise ValueError(
                "data.max_patches must be null with schedule.resolutions, whose image sizes set it, "
                f"got {self.data.max_patches}"
            )
        if self.optim.stochastic_rounding and self.precision != "bf16":
            raise ValueError(f"optim.stochastic_rounding needs precision=bf16, got precision={self.precision}")
        return self


ADAPTER: TypeAdapter[TrainConfig] = TypeAdapter(TrainConfig)

_IRRELEVANT = (
    "gc_every_steps",
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
    """The part of the configuration on which the trained weights depend."""
    tree = {key: value for key, value in to_tree(config).items() if key not in _IRRELEVANT}
    del tree["data"]["max_bad_fraction"]
    if isinstance(config.task, MaskedImageTask):
        for key in ("cache", "cache_leaves_gb", "shard"):
            del tree["task"]["teacher"][key]
    return tree


def process_count() -> int:
    """Number of ranks; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))
