"""Memory, FLOPs and traffic of one rank's step, from the trainer's step on tensors without data."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from evaclip.data.loader import Batch, rank_rows
from evaclip.errors import UserError
from evaclip.model.clip import CLIP
from evaclip.model.norm import Stream
from evaclip.model.tower import ResidualBlock, Tower
from evaclip.plan.gpus import Gpu
from evaclip.plan.recorder import (
    AVERAGE,
    CASTS,
    COLLECTIVES,
    COMMUNICATION,
    FROZEN,
    GRADIENTS,
    HOST,
    IN_NODE,
    INPUTS,
    NETWORK,
    OPTIMIZER,
    PARAMETERS,
    STAGES,
    Amounts,
    Phase,
    Recorder,
    Storage,
    communication,
    in_backward,
    local,
)
from evaclip.train.build import build_step, cast_matrices, check_batch, shards_parameters
from evaclip.train.config import TIMM, ContrastiveTask, TrainConfig
from evaclip.train.distributed import BUCKET_BYTES, World, fake_ranks
from evaclip.train.ema import Ema
from evaclip.train.loss import ContrastiveLoss
from evaclip.train.micro_batch import MicroBatch
from evaclip.train.sharding import forget_gathered, shard
from evaclip.train.step import TrainStep
from evaclip.train.tasks import task_class
from evaclip.train.tasks.contrastive import Contrastive

BLOCKS = 5
"""Blocks of each tower that are traced; the middle one stands for those left out."""
_TOWERS = {"visual": "image", "text": "text"}
_OPENING = "image.embed"
_SHARD_COPIES = 2
"""Copies of a block's shard under offload: the parameters to gather, and the reduced gradient."""


@dataclass(frozen=True)
class StepPlan:
    """One rank's step.

    Attributes:
        config: the run.
        gpus: ranks, one per GPU.
        local_batch: samples of a step on the rank that has most.
        micro_batch: largest number of samples in a micro-batch.
        parameters: parameters that one rank holds.
        model_parameters: parameters of the model.
        phase: phase in which most memory is in use.
        memory: bytes by kind at that moment.
        host: bytes of parameters, gradients and optimizer state that offload keeps in host memory.
        flops: FLOPs of a step by stage, two for a MAC.
        traffic: bytes that operators read and write in a step.
        received: bytes that the rank receives in a step, by collective.
        links: the same bytes by the link through which they come, `IN_NODE` or `NETWORK`.
        is_sharded: whether parameters are sharded.
        image_shape: height and width of the images.
    """

    config: TrainConfig
    gpus: int
    local_batch: int
    micro_batch: int
    parameters: int
    model_parameters: int
    phase: str
    memory: Amounts
    host: int
    flops: dict[str, int]
    traffic: int
    received: dict[str, int]
    links: dict[str, int]
    is_sharded: bool
    image_shape: tuple[int, int]

    def link_seconds(self, gpu: Gpu) -> float:
        """Bytes over bandwidth of the slower link; both work at once."""
        return max(self.links[IN_NODE] / gpu.node_gbps, self.links[NETWORK] / gpu.network_gbps) / 1e9


def plan_step(
    config: TrainConfig,
    gpus: int = 1,
    *,
    caption_tokens: int | None = None,
    image_size: int | None = None,
    blocks: int | None = BLOCKS,
) -> StepPlan:
    """Traces one step of one of `gpus` ranks.

    Args:
        config: of the run; weights are never loaded.
        caption_tokens: mean length of a caption, with start and end token; None for the task's assumption.
        image_size: side of the images; None for the model's image size.
        blocks: blocks of each tower that are traced; None for all.

    Raises:
        UserError: as the run itself would.
    """
    if gpus < 1:
        raise UserError(f"gpus must be at least 1, got {gpus}")
    if config.optim.name.startswith(TIMM):
        raise UserError(f"optim.name must be adamw or lamb for a plan, got {config.optim.name}")
    if config.data.resize:
        remedy = "--set data.resize=null data.max_patches=null plans images of the model's size"
        raise UserError(f"data.resize must be null for a plan, got {config.data.resize}; {remedy}")
    check_batch(config, World(torch.device("cpu"), size=gpus))
    options = config.model.options
    if isinstance(config.task, ContrastiveTask):  # images have the model's size
        options = {**options, "preprocess": {**options.get("preprocess", {}), "max_patches": None}}
    plain = replace(config.model, options=options, pretrained=None, pretrained_image=None, pretrained_text=None)
    config = replace(config, model=plain)
    if image_size is not None:
        # Evaluations have the model's own size.
        plain = replace(plain, options=_options(config, vision={"image_size": image_size}))
        config = replace(config, model=plain, eval=replace(config.eval, sets=None), validation_split=None)
    kind = task_class(config.task.name)
    group = kind.rows_per_group(config)
    local_batch = group * -(-config.batch_size // group // gpus)
    micro_batch = group * -(-local_batch // group // config.accumulation_steps)
    model = kind.create_model(config, device="meta")
    if isinstance(model, CLIP) and (encoder := model.config.text.hf_model_name):
        raise UserError(f"model.options.text.hf_model_name must be left out for a plan, got {encoder!r}")
    depths = {_TOWERS[name]: cast(Tower, tower).layers for name, tower in kind.towers_of(model).items()}
    layers = {name: {"layers": depth if blocks is None else min(blocks, depth)} for name, depth in depths.items()}
    options = _options(config, vision=layers["image"], text=layers.get("text"))
    # Two micro-batches, the first and the last, stand for any number.
    micro_batches = min(config.accumulation_steps, 2)
    traced = replace(
        config,
        model=replace(plain, options=options),
        batch_size=gpus * micro_batches * micro_batch,
        accumulation_steps=micro_batches,
        parallel=replace(config.parallel, offload="none"),
    )
    is_sharded = shards_parameters(config, World(torch.device("cpu"), size=gpus))
    world: AbstractContextManager[World] = nullcontext(World(torch.device("cpu")))
    if gpus > 1 or is_sharded:
        world = closing(fake_ranks("cpu", gpus))
    with world as ranks:
        trace = _Trace(traced, ranks, is_sharded, depths, caption_tokens)
        sizes = [config.batch_size, traced.batch_size] if config.accumulation_steps > 2 else []
        loss = [trace.loss(size) for size in sizes if isinstance(trace.task, Contrastive)]
    return _summarize(config, gpus, (local_batch, micro_batch), sum(p.numel() for p in model.parameters()), trace, loss)


class _Trace:
    """The recorded step of a model with few blocks.

    Attributes:
        task: of the model with few blocks.
        start: bytes by kind before the step, of the model with all its blocks.
        phases: of the step of the model with all its blocks.
        evaluation: forward pass of an evaluation; empty for a run without one.
        elements: parameters that the rank holds, of the model with all its blocks.
        largest: elements of the largest group of parameters that are gathered together, on this rank.
        largest_parameter: elements of the largest parameter.
    """

    def __init__(
        self, config: TrainConfig, world: World, is_sharded: bool, depths: dict[str, int], caption_tokens: int | None
    ) -> None:
        self.config, self.world, self.is_sharded = config, world, is_sharded
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        kind = task_class(config.task.name)
        model = kind.create_model(config, device="meta").train()
        cast_matrices(model, config.precision)
        if is_sharded:
            shard(kind.towers_of(model).values(), config.parallel, config.precision, world)
        self.task = task = kind.build(config, world, model)
        teacher = getattr(task, "teacher", None)
        with self._fake:
            for module in (model, *([teacher.tower] if teacher else [])):
                module.to_empty(device="cpu")
        self.towers = {_TOWERS[name]: cast(Tower, tower) for name, tower in task.towers.items()}
        self.extra = {name: depths[name] - tower.layers for name, tower in self.towers.items()}
        if caption_tokens is not None:
            if not isinstance(task, Contrastive):
                raise UserError(
                    f"--caption-tokens must be left out for task.name={config.task.name}: it has no captions"
                )
            longest = task.model.context_length
            if not 2 <= caption_tokens <= longest:
                raise UserError(f"--caption-tokens must be 2 to {longest}, got {caption_tokens}")
            task.mean_caption_tokens = caption_tokens
        self._record(Ema(model, config.ema_decay) if config.ema_decay is not None else None)

    def _record(self, ema: Ema | None) -> None:
        config, task, model = self.config, self.task, self.task.model
        rows = config.batch_size // self.world.size
        micro = rows // config.accumulation_steps
        is_evaluated = bool(config.eval.sets or config.validation_split)
        eval_rows = max(config.eval.batch_size, task.rows_per_group(config)) if is_evaluated else micro
        eval_samples = self._samples(eval_rows, {eval_rows})
        fixed = {FROZEN: list(task.extra_tensors()), AVERAGE: list(ema.state_dict().values()) if ema else []}
        with self._fake:
            # `_summarize` adds the mean of replicated gradients: the size of its buckets depends on the depth.
            step = build_step(config, self.world if self.is_sharded else World(self.world.device), task)
            # The first forward pass gathers all parameters once: an evaluation's.
            evaluation = self._evaluate(step, *eval_samples, fixed)
        self.evaluation = evaluation if is_evaluated else []
        images, targets = self._samples(rows, {micro})
        with self._fake:
            model.train()
            present = [images[:micro].clone(), targets[:micro].clone(), *model.buffers()]
            kinds = {**fixed, PARAMETERS: model.parameters(), INPUTS: present, HOST: [images, targets]}
            recorder = Recorder(kinds, _OPENING)
            with recorder, self._marking(recorder, step):
                recorder.mark("teacher" if hasattr(task, "teacher") else "begin")
                step(Batch([images], targets), 1)
                recorder.label((p.grad for p in step.parameters if p.grad is not None), GRADIENTS)
                state = step.optimizer.state
                recorder.label((value for values in state.values() for value in values.values()), OPTIMIZER)
                if ema:
                    ema.update(1)
        self.start, phases = recorder.finish()
        self.phases = self._deepen(phases)
        self._add_blocks(step, ema)

    def loss(self, batch_size: int) -> Phase:
        """The contrastive loss alone, forward and backward, of a global batch of this size."""
        counts = [len(rank_rows(batch_size, rank, self.world.size)) for rank in range(self.world.size)]
        assert isinstance(self.task, Contrastive)
        with self._fake:
            loss = ContrastiveLoss(self.config.loss, self.world.group, counts)
            width = self.task.model.config.embed_dim
            features = [torch.empty(counts[-1], width, requires_grad=True) for _ in range(2)]
            bias = None if self.task.model.logit_bias is None else torch.ones(())
            recorder = Recorder({INPUTS: features}, _OPENING)
            recorder.mark("loss")
            with recorder:
                loss(features[0], features[1], torch.ones((), requires_grad=True), bias).backward()
        return recorder.finish()[1][0]

    def _samples(self, rows: int, sizes: set[int]) -> tuple[Tensor, Tensor]:
        """Images and targets of a rank; `sizes` are those of their micro-batches."""
        targets = self.task.stand_ins(rows, sizes, partial(tree_map_only, Tensor, self._fake.from_tensor))
        with self._fake:
            return torch.empty(rows, 3, *self.task.visual.config.image_shape), targets

    def _evaluate(
        self, step: TrainStep, images: Tensor, targets: Tensor, fixed: dict[str, list[Tensor]]
    ) -> list[Phase]:
        task, dtype = self.task, step.autocast_dtype
        task.model.eval()
        recorder = Recorder({**fixed, PARAMETERS: task.model.parameters(), INPUTS: task.model.buffers()}, _OPENING)
        recorder.mark("evaluation")
        with recorder, torch.no_grad(), torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
            if isinstance(task, Contrastive):
                task.model(images, targets, packing=task.model.text.pack_tokens(targets))
            else:
                cast(Any, task).of_samples(images, MicroBatch(slice(0, len(images)), targets, None, 0, 0))
        _, phases = recorder.finish()
        forget_gathered(task.model)
        return phases

    @contextmanager
    def _marking(self, recorder: Recorder, step: TrainStep) -> Iterator[None]:
        """Marks where phases begin, in the forward and in the backward pass."""

        def mark(name: str, before: str, stream: Stream) -> None:
            if in_backward():
                return  # recomputation
            recorder.mark(name)
            # The gradient of the branch arrives first.
            last = stream.x if stream.branch is None else stream.branch
            if last.requires_grad:
                last.register_hook(lambda _: recorder.mark(f"~{before}"))

        handles = [step.optimizer.register_step_pre_hook(lambda *_: recorder.mark("optimizer"))]
        handles.append(self.task.model.register_forward_hook(lambda *_: recorder.mark("loss")))
        if teacher := getattr(self.task, "teacher", None):
            handles.append(teacher.tower.patch_embed.register_forward_pre_hook(lambda *_: recorder.mark("teacher")))
        for tower_name, tower in self.towers.items():
            blocks = _blocks(tower)
            names = [f"{tower_name}.{part}" for part in ("embed", *(f"block.{i}" for i in range(len(blocks))), "head")]
            hook = partial(lambda name, *_: recorder.mark(name), names[0])
            handles.append(tower.register_forward_pre_hook(hook, prepend=True))
            for block, before, name in zip(blocks, names[:-2], names[1:-1], strict=True):
                hook = partial(lambda name, before, _, args: mark(name, before, args[0]), name, before)
                handles.append(block.register_forward_pre_hook(hook, prepend=True))
            hook = partial(lambda name, before, _, args, output: mark(name, before, output), names[-1], names[-2])
            handles.append(blocks[-1].register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _deepen(self, phases: list[Phase]) -> list[Phase]:
        """The phases of the model with all its blocks: each tower's middle block is repeated."""
        middles = {f"{name}.block.{tower.layers // 2}": self.extra[name] for name, tower in self.towers.items()}
        # Autocast frees casts that nothing has saved for backward all at once, after the model.
        casts: Amounts = Counter()
        deep = []
        for phase in phases:
            repeats = middles.get(phase.name.lstrip("~"), 0)
            deep += [phase] * (1 + repeats)
            casts[str(phase.number)] += repeats * sum(size for kind, size in phase.sizes() if kind == CASTS)
        for phase in phases:
            if phase.name == "loss":
                phase.changes.append((Storage(CASTS, 0), -casts[str(phase.number)]))
        return deep

    def _add_blocks(self, step: TrainStep, ema: Ema | None) -> None:
        """Adds to `start` the parameters of blocks left out, with their optimizer state and averages."""
        traced = list(self.task.model.parameters())
        self.elements = rest = sum(local(p).numel() for p in traced)
        self.largest, self.largest_parameter = 0, max(p.numel() for p in traced)
        for name, tower in self.towers.items():
            blocks, extra = _blocks(tower), self.extra[name]
            parameters = list(blocks[len(blocks) // 2].parameters())
            elements = sum(local(p).numel() for p in parameters)
            state = [value for p in parameters for value in step.optimizer.state.get(p, {}).values()]
            self.start[PARAMETERS] += extra * sum(local(p).nbytes for p in parameters)
            self.start[OPTIMIZER] += extra * sum(local(value).nbytes for value in state)
            self.start[AVERAGE] += extra * 4 * elements if ema else 0
            self.elements += extra * elements
            self.largest = max(self.largest, elements)
            rest -= elements * len(blocks)
        self.largest = max(self.largest, rest)


def _summarize(
    config: TrainConfig, gpus: int, batches: tuple[int, int], parameters: int, trace: _Trace, loss: list[Phase]
) -> StepPlan:
    (local_batch, micro_batch), task, phases = batches, trace.task, trace.phases
    other_rows = local_batch - trace.config.batch_size // gpus
    start = Counter(trace.start)
    if other_rows > 0:
        # Which patches are kept is drawn for all micro-batches, and a contrastive loss holds all features.
        if task.visual.patch_dropout:
            start[INPUTS] += other_rows * task.visual.num_kept_patches() * 8
        if isinstance(task, Contrastive):
            start["features of other micro-batches"] += 4 * other_rows * task.model.config.embed_dim * 4
    costs: Amounts = Counter()
    for phase in phases:
        # Of several forward passes the odd ones are of the first micro-batch, which stands for all but the last.
        times = config.accumulation_steps - 1 if config.accumulation_steps > 1 and phase.number % 2 else 1
        costs.update({key: times * value for key, value in phase.costs.items()})
    if loss:
        costs.update(loss[0].costs)
        costs.subtract(loss[1].costs)
    if gpus > 1 and not trace.is_sharded:
        costs.update(communication("all-reduce", 4 * trace.elements, range(gpus)))
        # Copies of gradients during the mean over ranks.
        most = 3 * BUCKET_BYTES + max(BUCKET_BYTES, 4 * trace.largest_parameter)
        copies = Storage(COMMUNICATION, 0), min(4 * trace.elements, most)
        last = max(index for index, phase in enumerate(phases) if phase.name == "loss")
        phases = [*phases[: last + 1], Phase("mean", 0, [copies]), *phases[last + 1 :]]
    host = 0
    if config.parallel.offload != "none":
        gradients = sum(size for phase in phases for kind, size in phase.sizes() if kind == GRADIENTS)
        host = sum(start.pop(kind, 0) for kind in (PARAMETERS, OPTIMIZER, AVERAGE)) + gradients
        start[COMMUNICATION] += _SHARD_COPIES * trace.largest * (trace.start[PARAMETERS] // trace.elements)
    moments = [_peak(start, each, {GRADIENTS} if host else set()) for each in (phases, trace.evaluation, loss[:1])]
    name, memory = max(moments, key=lambda moment: moment[1].total())
    return StepPlan(
        config=config,
        gpus=gpus,
        local_batch=local_batch,
        micro_batch=micro_batch,
        parameters=trace.elements,
        model_parameters=parameters,
        phase=name,
        memory=Counter({kind: size for kind, size in memory.items() if size}),
        host=host,
        flops={stage: costs[stage] for stage in STAGES if costs[stage]},
        traffic=costs["bytes"],
        received={collective: costs[collective] for collective in COLLECTIVES if costs[collective]},
        links={link: costs[link] for link in (IN_NODE, NETWORK)},
        is_sharded=trace.is_sharded,
        image_shape=task.visual.config.image_shape,
    )


def _peak(start: Amounts, phases: list[Phase], ignored: set[str]) -> tuple[str, Amounts]:
    """The phase in which most memory is in use, and the bytes by kind at that moment."""
    changes = [(phase.name, *change) for phase in phases for change in phase.sizes() if change[0] not in ignored]
    totals = [0, *accumulate(size for _, _, size in changes)]
    count = totals.index(max(totals))
    memory = Counter(start)
    for _, kind, size in changes[:count]:
        memory[kind] += size
    return changes[count - 1][0] if count else "begin", memory


def _options(config: TrainConfig, vision: dict[str, Any], text: dict[str, Any] | None = None) -> dict[str, Any]:
    """Options of the model with these changes of its towers; options of an image model are not nested."""
    options = config.model.options
    if not isinstance(config.task, ContrastiveTask):
        return {**options, **vision}
    changes = {"vision": vision, "text": text or {}}
    return {**options, **{name: {**options.get(name, {}), **change} for name, change in changes.items() if change}}


def _blocks(tower: Tower) -> list[ResidualBlock]:
    """Blocks of the encoder; those of a decoder follow them."""
    return [module for module in tower.modules() if isinstance(module, ResidualBlock)][: tower.layers]
