"""Runs the real model, with few blocks and tensors without data, through one training step."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.nn import Module
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves, tree_map_only

from evaclip.errors import UserError
from evaclip.model.norm import Stream
from evaclip.model.tower import ResidualBlock, Tower
from evaclip.plan.job import Job
from evaclip.plan.phases import UNCAST, Bytes, Steps, read
from evaclip.plan.recorder import FROZEN, GRADIENTS, INPUTS, PARAMETERS, Recorder, local
from evaclip.plan.tasks import Batch, Planned, planned
from evaclip.train.build import precision_of_parameters
from evaclip.train.distributed import accumulate_in_float32
from evaclip.train.sharding import forget_gathered, shard, synchronize_gradients
from evaclip.train.tasks import task_class
from evaclip.weights import is_cut

BLOCKS = 5
"""Of each tower that are traced: the first, the last, and three between, whose middle one stands for all others."""
_AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
_TOWERS = {"visual": "image", "text": "text"}
"""Names of phases, by those that tasks have."""


def without_data(model: Module, mode: FakeTensorMode) -> None:
    """Gives a model on the meta device parameters and buffers that count as memory of a CPU."""
    with mode:
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))


class Trace(NamedTuple):
    """A step of a model with few blocks.

    Attributes:
        steps: its phases.
        block_bytes: what one block's parameters take on one GPU, by tower.
        elements: parameters that one GPU holds outside of blocks, and in one block of each tower.
        uncut: those of them that are in no tower, and whole everywhere.
        whole: the model with all its blocks.
    """

    steps: Steps
    block_bytes: dict[str, int]
    elements: dict[str, int]
    uncut: int
    whole: "Whole"


class Whole(NamedTuple):
    """A model with all its blocks.

    Attributes:
        parameters: how many.
        largest: how many are in the largest one.
        depths: blocks of each tower.
        flops_per_sample: that it is known by, forward and backward.
    """

    parameters: int
    largest: int
    depths: dict[str, int]
    flops_per_sample: float


def trace(job: Job, blocks: int = BLOCKS) -> Trace:
    """One training step of one GPU, from the forward pass to the end of the backward pass.

    The phases are `teacher`, `image.embed`, `image.block.I`, `image.head`, the same of `text`, as far as there are
    such, `autocast.end`, `loss`, those of the towers once more with `~` in front for the backward pass, and `end`. A
    loss that couples samples isn't run; any other one is part of `image.head`. With accumulation there are two chunks,
    the first and the last.

    Args:
        blocks: the towers are cut to this many blocks, if they have more.
    """
    return _traced(_as_traced(job), blocks)


def _as_traced(job: Job) -> Job:
    """The same for all jobs that differ only in what a trace doesn't see; a copy, as a cache needs."""
    gpus, accumulation = 1 if job.mode == "replicate" else job.gpus, min(job.accumulation, 2)
    return replace(
        job,
        gpus=gpus,
        accumulation=accumulation,
        global_batch=gpus * accumulation * job.chunk,
        optimizer="lamb",
        state_dtype="fp32",
        samples=None,
        task=deepcopy(job.task),
        options=deepcopy(job.options),
    )


@lru_cache(maxsize=256)
def _traced(job: Job, blocks: int) -> Trace:
    few = _shallow(job, blocks)
    alone = replace(job, gpus=1, mode="replicate", shard_size=None, offload="none")
    whole = _whole(replace(alone, global_batch=job.together, accumulation=1))
    with _ready(few) as (task, batch):
        model, recorder = task.model, _recorder(task, batch)
        if few.accumulation > 1:
            accumulate_in_float32(model.parameters(), reduce_each_chunk=job.accumulate == "shards")
        with recorder:
            for last in (False, True) if few.accumulation > 1 else (True,):
                synchronize_gradients(_towers(task).values(), last or job.accumulate == "shards")
                _pass(task, batch, recorder)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    recorder.relabel(parameter.grad, GRADIENTS)
        return Trace(read(recorder.recording), *_sizes(task), whole)


@lru_cache(maxsize=256)
def _whole(job: Job) -> Whole:
    model = _build(job)
    without_data(model, FakeTensorMode())
    task, sizes = planned(job.task)(job, model), [parameter.numel() for parameter in model.parameters()]
    depths = {name: tower.layers for name, tower in _towers(task).items()}
    return Whole(sum(sizes), max(sizes), depths, task.task.flops_per_sample(job.vision.image_size))


def evaluation_bytes(job: Job) -> Bytes:
    """What an evaluation's forward pass takes at its highest moment, besides what there is all the time."""
    samples = max(job.evaluated, job.together) * job.gpus
    return _evaluation_bytes(_as_traced(replace(job, accumulation=1, global_batch=samples)))


@lru_cache(maxsize=256)
def _evaluation_bytes(job: Job) -> Bytes:
    # Nothing is kept, so that a deep model needs no more than a shallow one; no patch is dropped.
    few = _shallow(replace(job, token_dropout=0.0), 2)
    with _ready(few) as (task, batch):
        recorder = _recorder(task, batch)
        task.model.eval()
        recorder.mark("evaluation")
        with recorder, torch.no_grad(), _autocast(few):
            task.evaluate(batch)
        return read(recorder.recording).phases[0].peak


@contextmanager
def _ready(job: Job) -> Iterator[tuple[Planned, Batch]]:
    """The task and a batch without data, and what they need to be run."""
    with ExitStack() as stack:
        if job.mode != "replicate":
            stack.enter_context(_process_group(job.gpus))
        model, mode = _build(job), FakeTensorMode()
        without_data(model, mode)
        if job.mode != "replicate":
            shard(task_class(job.task.name).towers_of(model).values(), *job.sharding())
        task = planned(job.task)(job, model)
        targets, layout = task.targets(partial(tree_map_only, Tensor, mode.from_tensor))
        stack.enter_context(mode)
        index = torch.empty(job.chunk, job.kept_patches, dtype=torch.int64) if job.token_dropout else None
        batch = Batch(torch.empty(job.chunk, 3, *job.vision.image_shape), targets, index, layout)
        if job.mode != "replicate":
            _gather_once(model)
        task.warm_up(batch)
        yield task, batch


def _shallow(job: Job, blocks: int) -> Job:
    options = job.with_vision(layers=min(blocks, job.vision.layers))
    if job.has_texts:
        options["text"] = {**options.get("text", {}), "layers": min(blocks, job.config.text.layers)}
    return replace(job, options=options)


def _towers(task: Planned) -> dict[str, Tower]:
    towers = task_class(task.job.task.name).towers_of(task.model)
    return {_TOWERS[name]: cast(Tower, tower) for name, tower in towers.items()}


def _blocks(tower: Tower) -> list[ResidualBlock]:
    """Without those of a decoder, which come behind them."""
    return [module for module in tower.modules() if isinstance(module, ResidualBlock)][: tower.layers]


def _recorder(task: Planned, batch: Batch) -> Recorder:
    """One that knows what there is before the step."""
    recorder = Recorder()
    inputs = [leaf for leaf in tree_leaves((batch, list(task.model.buffers()))) if isinstance(leaf, Tensor)]
    for kind, tensors in {PARAMETERS: task.model.parameters(), INPUTS: inputs, FROZEN: task.task.beside()}.items():
        for tensor in tensors:
            recorder.know(tensor, kind)
    return recorder


def _gather_once(model: Module) -> None:
    """What sharding does at the first step only, which isn't recorded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    forget_gathered(model)


def _pass(task: Planned, batch: Batch, recorder: Recorder) -> None:
    """Forward and backward pass of one chunk."""
    with ExitStack() as stack:
        for handle in _hooks(task, recorder):
            stack.callback(handle.remove)
        if task.before:
            recorder.mark(task.before)
        with _autocast(task.job):
            found = task.forward(batch)
            recorder.mark(UNCAST)
        recorder.mark("loss")
        for name, value in found.items():
            value.register_hook(lambda _, name=name: recorder.mark(f"~{name}"))
        gradients = [torch.empty_like(value) for value in found.values()]
        torch.autograd.backward(list(found.values()), gradients)
        recorder.mark("end")


def _sizes(task: Planned) -> tuple[dict[str, int], dict[str, int], int]:
    everything = list(task.model.parameters())
    sizes, elements = {}, {"rest": sum(local(p).numel() for p in everything)}
    for name, tower in _towers(task).items():
        blocks = _blocks(tower)
        parameters = [local(parameter) for parameter in blocks[len(blocks) // 2].parameters()]
        sizes[name] = sum(parameter.untyped_storage().nbytes() for parameter in parameters)
        elements[name] = sum(parameter.numel() for parameter in parameters)
        elements["rest"] -= elements[name] * len(blocks)
    return sizes, elements, sum(p.numel() for p in everything if not is_cut(p))


def _hooks(task: Planned, recorder: Recorder) -> Iterator[Any]:
    """Marks where phases begin, forward and backward."""

    def mark(name: str, backward: str, stream: Stream) -> None:
        if torch._C._current_graph_task_id() >= 0:
            return
        recorder.mark(name)
        # That of the last branch comes first: the backward pass of what made it begins with it.
        last = stream.x if stream.branch is None else stream.branch
        if last.requires_grad:
            last.register_hook(lambda _: recorder.mark(backward))

    def before(name: str, backward: str, module: Any, args: Any) -> None:
        mark(name, backward, args[0])

    def after(name: str, backward: str, module: Any, args: Any, output: Stream) -> None:
        mark(name, backward, output)

    for name, tower in _towers(task).items():
        yield tower.register_forward_pre_hook(lambda _, args, name=name: recorder.mark(f"{name}.embed"), prepend=True)
        blocks = _blocks(tower)
        for index, block in enumerate(blocks):
            # The gradient of a block's input ends its own backward pass, and begins that of what is in front of it.
            previous = f"~{name}.block.{index - 1}" if index else f"~{name}.embed"
            yield block.register_forward_pre_hook(partial(before, f"{name}.block.{index}", previous), prepend=True)
        yield blocks[-1].register_forward_hook(partial(after, f"{name}.head", f"~{name}.block.{len(blocks) - 1}"))


def _build(job: Job) -> Module:
    precision = precision_of_parameters(job.precision)
    return task_class(job.task.name).create_model(job.run, device="meta", precision=precision).train()


def _autocast(job: Job) -> AbstractContextManager[object]:
    # Shards are gathered in the 16-bit type, so that there is nothing left to cast.
    dtype = _AUTOCAST.get(job.precision) if job.mode == "replicate" else None
    return torch.autocast("cpu", dtype=dtype) if dtype else nullcontext()


@contextmanager
def _process_group(size: int) -> Iterator[None]:
    """Of `size` processes that aren't there: collectives return at once."""
    if dist.is_initialized():
        raise UserError("a plan of sharded training can't be made inside of a process group")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
