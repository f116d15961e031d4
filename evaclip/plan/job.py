"""What is planned: a model, a batch, and how it is spread."""

from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import torch

from evaclip.errors import UserError, unknown_name
from evaclip.model.config import CLIPConfig, get_config, override
from evaclip.model.savings import Savings
from evaclip.train.config import ParallelConfig, Precision
from evaclip.train.distributed import World
from evaclip.train.recipes import get_recipe

Mode = Literal["replicate", "shard", "hybrid"]
StateType = Literal["fp32", "bf16"]
Offload = Literal["none", "cpu"]

CAPTION_TOKENS = 15


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run, as far as its cost depends on it.

    Attributes:
        gpus: processes, one for each.
        global_batch: samples of one optimizer step over all of them: the contrastive batch.
        token_dropout: share of the patches that training leaves out.
        accumulation: chunks that each process passes through the model one after the other.
        mode, reshard, shard_size, offload: as `parallel` in a training configuration.
        state_dtype: of the optimizer's two moments.
        ema: whether a moving average of the weights is kept, in float32.
        caption_tokens: mean length of a caption from its start to its end token.
        samples: of the whole run; None for what isn't known.
        fused: false for a model in torch's own operators, without this library's.
        options: of the model that differ from the named one's.
    """

    model: str
    gpus: int = 1
    global_batch: int = 1024
    token_dropout: float = 0.0
    precision: Precision = "amp_bf16"
    savings: Savings = field(default_factory=Savings)
    mode: Mode = "shard"
    reshard: bool = True
    shard_size: int | None = None
    offload: Offload = "none"
    optimizer: Literal["adamw", "lamb"] = "lamb"
    state_dtype: StateType = "fp32"
    ema: bool = False
    accumulation: int = 1
    caption_tokens: int = CAPTION_TOKENS
    samples: int | None = None
    fused: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = {"precision": Precision, "mode": Mode, "state_dtype": StateType, "offload": Offload}
        for name, choices in kinds.items():
            if getattr(self, name) not in get_args(choices):
                raise unknown_name(name, str(getattr(self, name)), get_args(choices))
        for name in ("gpus", "global_batch", "accumulation", "samples", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; expected at least 1")
        if not 0 <= self.token_dropout < 1:
            raise UserError(f"token_dropout is {self.token_dropout}; expected 0 <= share < 1")
        parts = self.gpus * self.accumulation
        if self.global_batch < parts:
            raise UserError(
                f"global_batch {self.global_batch:,} is less than one sample for each of {parts:,} chunks "
                f"({self.gpus} GPUs x accumulation {self.accumulation})"
            )
        if (self.shard_size is not None) != (self.mode == "hybrid"):
            raise UserError(f"hybrid, and no other mode, has a shard_size; given {self.mode} and {self.shard_size}")
        if self.shard_size is not None and self.gpus % self.shard_size:
            raise UserError(f"shard_size {self.shard_size} doesn't divide {self.gpus} GPUs")
        if self.offload != "none" and self.mode == "replicate":
            raise UserError(f"offload {self.offload} needs mode shard or hybrid, given replicate")
        longest = self.config.text.context_length
        if not 2 <= self.caption_tokens <= longest:
            raise UserError(f"caption_tokens is {self.caption_tokens}; expected 2 to {longest}")

    def __hash__(self) -> int:
        # Options, a dict, can't be hashed; jobs that differ in them alone are told apart by equality.
        return hash((self.model, self.gpus, self.global_batch, self.accumulation, self.token_dropout, self.savings))

    @classmethod
    def of_recipe(cls, name: str, **changes: Any) -> Self:
        """The job that a recipe of `evaclip train` describes, but for `changes`."""
        config = get_recipe(name)
        values: dict[str, Any] = {
            "model": config.model.name,
            "global_batch": config.batch_size,
            "token_dropout": config.model.patch_dropout or 0.0,
            "precision": config.precision,
            "savings": config.model.savings,
            "optimizer": config.optim.name,
            "ema": config.ema_decay is not None,
            "accumulation": config.accumulation,
            "mode": config.parallel.mode,
            "reshard": config.parallel.reshard,
            "shard_size": config.parallel.shard_size,
            "offload": config.parallel.offload,
            "samples": None if config.schedule.steps is None else config.schedule.steps * config.batch_size,
            "options": config.model.options,
        }
        return cls(**{**values, **changes})

    def sharding(self) -> tuple[ParallelConfig, Precision, World]:
        """What `evaclip.train.sharding.shard` takes besides the model."""
        parallel = ParallelConfig(
            mode=self.mode, reshard=self.reshard, shard_size=self.shard_size, offload=self.offload
        )
        return parallel, self.precision, World(torch.device("cpu"), size=self.gpus)

    @property
    def config(self) -> CLIPConfig:
        """Of the model."""
        return override(get_config(self.model), self.options)

    @property
    def local_batch(self) -> int:
        """Samples of one step on one GPU, the one that has most."""
        return -(-self.global_batch // self.gpus)

    @property
    def chunk(self) -> int:
        """Samples that pass through the model at a time, at most."""
        return -(-self.local_batch // self.accumulation)

    @property
    def weight_bytes(self) -> int:
        """Of one parameter, and of its gradient when all processes have added to it."""
        return 2 if self.precision in ("bf16", "fp16") else 4

    @property
    def state_bytes(self) -> int:
        """Of a parameter's two moments."""
        return 2 * {"fp32": 4, "bf16": 2}[self.state_dtype]

    @property
    def average_bytes(self) -> int:
        """Of a parameter's moving average."""
        return 4 if self.ema else 0

    @property
    def kept_patches(self) -> int:
        """Of each image, in training."""
        return max(1, int(self.config.vision.num_patches * (1 - self.token_dropout)))

    @property
    def shards(self) -> int:
        """GPUs that share one copy of parameters, gradients and moments."""
        if self.mode == "replicate":
            return 1
        return self.shard_size or self.gpus
