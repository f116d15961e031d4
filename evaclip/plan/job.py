"""What is planned: a model, a batch, and how it is spread."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch

from evaclip.data.config import DataConfig
from evaclip.errors import UserError
from evaclip.model.config import CLIPConfig, Savings, VisionConfig, get_config, override
from evaclip.model.vision_names import split_name, vision_config
from evaclip.plan.tasks import planned
from evaclip.train.build import check_batch
from evaclip.train.config import (
    ContrastiveTask,
    ModelConfig,
    ParallelConfig,
    Precision,
    ScheduleConfig,
    TaskConfig,
    TrainConfig,
)
from evaclip.train.distributed import World
from evaclip.train.schedule import total_steps
from evaclip.train.tasks import task_class

Mode = Literal["replicate", "shard", "hybrid"]
StateType = Literal["fp32", "bf16"]
Offload = Literal["none", "cpu"]

CAPTION_TOKENS = 15


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run, as far as its cost depends on it.

    Attributes:
        gpus: processes, one for each.
        task: what is learnt; what it takes of the data, such as the number of classes, is in it.
        global_batch: samples of one optimizer step over all of them.
        token_dropout: share of the patches that training leaves out.
        accumulation: chunks that each process passes through the model one after the other.
        mode, reshard, shard_size, accumulate, offload: as `parallel` in a training configuration.
        state_dtype: of the optimizer's two moments.
        caption_tokens: mean length of a caption from its start to its end token.
        samples: of the whole run; None for what isn't known.
        averaged: a moving average of the weights is kept, in float32.
        evaluated: samples of a batch of an evaluation; 0 for a run that evaluates nothing.
        options: of the model that differ from the named one's.
    """

    model: str
    task: TaskConfig = field(default_factory=ContrastiveTask)
    gpus: int = 1
    global_batch: int = 1024
    token_dropout: float = 0.0
    precision: Precision = "amp_bf16"
    savings: Savings = field(default_factory=Savings)
    mode: Mode = "shard"
    reshard: bool = True
    shard_size: int | None = None
    accumulate: Literal["whole", "shards"] = "whole"
    offload: Offload = "none"
    optimizer: Literal["adamw", "lamb"] = "lamb"
    state_dtype: StateType = "fp32"
    accumulation: int = 1
    caption_tokens: int = CAPTION_TOKENS
    samples: int | None = None
    averaged: bool = False
    evaluated: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UserError(f"gpus is {self.gpus}; expected at least 1")
        parts = self.gpus * self.accumulation
        if self.global_batch < parts:
            raise UserError(
                f"global_batch {self.global_batch:,} is less than one sample for each of {parts:,} chunks "
                f"({self.gpus} GPUs x accumulation {self.accumulation})"
            )
        if self.shard_size is not None and self.gpus % self.shard_size:
            raise UserError(f"shard_size {self.shard_size} doesn't divide {self.gpus} GPUs")
        longest = self.config.text.context_length if self.has_texts else self.caption_tokens
        if not 2 <= self.caption_tokens <= longest:
            raise UserError(f"caption_tokens is {self.caption_tokens}; expected 2 to {longest}")

    def __hash__(self) -> int:
        # Options, a dict, can't be hashed; jobs that differ in them alone are told apart by equality.
        return hash((self.model, self.gpus, self.global_batch, self.accumulation, self.token_dropout, self.savings))

    @classmethod
    def of(cls, config: TrainConfig, gpus: int = 1, **more: Any) -> Self:
        """The job that a configuration of `evaclip train` describes, on this many GPUs.

        Raises:
            UserError: as the run itself would.
        """
        check_batch(config, World(torch.device("cpu"), size=gpus))
        model, parallel, steps = config.model, config.parallel, known_steps(config)
        evaluated = bool(config.eval.sets or config.held_out)
        is_cut = gpus > 1 or parallel.offload != "none"
        values: dict[str, Any] = {
            "model": model.name,
            "task": planned(config.task).settled(config),
            "global_batch": config.batch_size,
            "precision": config.precision,
            "savings": model.savings,
            "optimizer": config.optim.name,
            "accumulation": config.accumulation,
            "mode": parallel.mode if is_cut else "replicate",
            "reshard": parallel.reshard,
            "shard_size": parallel.shard_size if is_cut else None,
            "accumulate": parallel.accumulate,
            "offload": parallel.offload,
            "samples": None if steps is None else steps * config.batch_size,
            "averaged": config.ema_decay is not None,
            "evaluated": config.eval.batch_size if evaluated else 0,
            "options": model.options,
        }
        if model.patch_dropout is not None:
            values["token_dropout"] = model.patch_dropout
        given = {**values, **more}
        job = cls(gpus=gpus, **given)
        if "caption_tokens" in more and not job.has_texts:
            raise UserError(f"task.name={config.task.name} has no captions: leave out how long they are")
        return job if "token_dropout" in given else replace(job, token_dropout=job.vision.patch_dropout)

    def sharding(self) -> tuple[ParallelConfig, Precision, World]:
        """What `evaclip.train.sharding.shard` takes besides the model."""
        parallel = ParallelConfig(
            mode=self.mode, reshard=self.reshard, shard_size=self.shard_size, offload=self.offload
        )
        return parallel, self.precision, World(torch.device("cpu"), size=self.gpus)

    @property
    def run(self) -> TrainConfig:
        """The configuration that model and task are built from."""
        options = self.with_vision(patch_dropout=self.token_dropout)
        return replace(
            _run(self.task),
            batch_size=self.global_batch,
            precision=self.precision,
            accumulation=self.accumulation,
            parallel=self.sharding()[0],
            model=ModelConfig(name=self.model, options=options, savings=self.savings),
        )

    @property
    def has_texts(self) -> bool:
        """Whether the model is a CLIP, and not an image model by itself."""
        return isinstance(self.task, ContrastiveTask)

    @property
    def couples(self) -> bool:
        """Whether the loss is of all samples at once: see `Planned`."""
        return planned(self.task).couples

    @property
    def config(self) -> CLIPConfig:
        """Of a CLIP."""
        return override(get_config(self.model), self.options)

    @property
    def vision(self) -> VisionConfig:
        """Of the image tower."""
        if self.has_texts:
            return self.config.vision
        return override(vision_config(split_name(self.model)[0]), self.options)

    def with_vision(self, **changes: Any) -> dict[str, Any]:
        """The options, but for those of the image tower that change."""
        if not self.has_texts:
            return {**self.options, **changes}
        return {**self.options, "vision": {**self.options.get("vision", {}), **changes}}

    @property
    def together(self) -> int:
        """Samples that no GPU and no chunk parts."""
        return task_class(self.task.name).rows_together(_run(self.task))

    @property
    def local_batch(self) -> int:
        """Samples of one step on one GPU, the one that has most."""
        return self.together * -(-self.global_batch // self.together // self.gpus)

    @property
    def chunk(self) -> int:
        """Samples that pass through the model at a time, at most."""
        return self.together * -(-self.local_batch // self.together // self.accumulation)

    @property
    def weight_bytes(self) -> int:
        """Of one parameter."""
        return 2 if self.precision in ("bf16", "fp16") else 4

    @property
    def gradient_bytes(self) -> int:
        """Of one parameter's gradient when all ranks and micro-batches have added to it."""
        is_summed = self.accumulation > 1 and (self.mode == "replicate" or self.accumulate == "shards")
        return 4 if is_summed else self.weight_bytes

    @property
    def state_bytes(self) -> int:
        """Of a parameter's two moments."""
        return 2 * {"fp32": 4, "bf16": 2}[self.state_dtype]

    @property
    def kept_patches(self) -> int:
        """Of each image, in training."""
        return max(1, int(self.vision.num_patches * (1 - self.token_dropout)))

    @property
    def shards(self) -> int:
        """GPUs that share one copy of parameters, gradients and moments."""
        if self.mode == "replicate":
            return 1
        return self.shard_size or self.gpus


def known_steps(config: TrainConfig) -> int | None:
    """How many the run has; None where its data alone can tell."""
    schedule = config.schedule
    return total_steps(schedule, config.batch_size, 0) if schedule.steps or schedule.epoch_samples else None


def _run(task: TaskConfig) -> TrainConfig:
    data, schedule = DataConfig(train=""), ScheduleConfig(steps=1)
    return TrainConfig(name="plan", batch_size=1, data=data, schedule=schedule, task=task)
