"""Runs the real model, with few blocks and tensors without data, through one training step."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.nn import Module
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves, tree_map_only

from evaclip.errors import UserError
from evaclip.factory import create_model
from evaclip.model.captions import Layout
from evaclip.model.clip import CLIP
from evaclip.model.config import TextConfig
from evaclip.model.recompute import ResidualBlock
from evaclip.plan.job import Job
from evaclip.plan.phases import UNCAST, Bytes, Steps, read
from evaclip.plan.recorder import GRADIENTS, INPUTS, PARAMETERS, Recorder, local
from evaclip.train.sharding import forget_gathered, shard, synchronize_gradients

BLOCKS = 5
"""Of each tower that are traced: the first, the last, and three between, whose middle one stands for all others."""
_AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


class Batch(NamedTuple):
    """What a step gets."""

    images: Tensor
    tokens: Tensor
    token_index: Tensor | None
    layout: Layout


def caption_lengths(count: int, mean: int, longest: int) -> list[int]:
    """Of `count` captions: one as long as can be, as in any large batch, and the others so that the mean is right."""
    if count == 1:
        return [mean]
    rest, extra = divmod(max(count * mean - longest, 2 * (count - 1)), count - 1)
    return [longest, *(min(rest + (index < extra), longest) for index in range(count - 1))]


def caption_tokens(lengths: list[int], config: TextConfig) -> Tensor:
    """Token ids `[len(lengths), context_length]` whose end tokens stand where the lengths say."""
    tokens = torch.zeros(len(lengths), config.context_length, dtype=torch.int64)
    tokens[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = config.vocab_size - 1
    return tokens


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
        parameters: of the model with all its blocks.
    """

    steps: Steps
    block_bytes: dict[str, int]
    elements: dict[str, int]
    parameters: int


def trace(job: Job, blocks: int = BLOCKS) -> Trace:
    """One training step of one GPU, from the forward pass to the end of the backward pass.

    The phases are `image.embed`, `image.block.I`, `image.head`, the same of `text`, `autocast.end`, `loss`, those of
    the towers once more with `~` in front for the backward pass, and `end`. The loss itself isn't run. With
    accumulation there are two chunks, the first and the last.

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
        options=deepcopy(job.options),
    )


@lru_cache(maxsize=256)
def _traced(job: Job, blocks: int) -> Trace:
    few, parameters = _shallow(job, blocks), sum(p.numel() for p in _build(job).parameters())
    with _ready(few) as (model, batch):
        recorder = _recorder(model, batch)
        with recorder:
            for last in (False, True) if few.accumulation > 1 else (True,):
                synchronize_gradients(model.children(), last or job.accumulate == "shards")
                _pass(model, few, batch, recorder)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    recorder.relabel(parameter.grad, GRADIENTS)
        return Trace(read(recorder.recording), *_sizes(model), parameters)


def evaluation_bytes(job: Job) -> Bytes:
    """What an evaluation's forward pass takes at its highest moment, besides what there is all the time."""
    return _evaluation_bytes(_as_traced(replace(job, accumulation=1, global_batch=job.evaluated * job.gpus)))


@lru_cache(maxsize=256)
def _evaluation_bytes(job: Job) -> Bytes:
    # Nothing is kept, so that a deep model needs no more than a shallow one; no patch is dropped.
    few = _shallow(replace(job, token_dropout=0.0), 2)
    with _ready(few) as (model, batch):
        recorder = _recorder(model.eval(), batch)
        recorder.mark("evaluation")
        with recorder, torch.no_grad(), _autocast(few):
            model(batch.images, batch.tokens, layout=batch.layout)
        return read(recorder.recording).phases[0].peak


@contextmanager
def _ready(job: Job) -> Iterator[tuple[CLIP, Batch]]:
    """The model and a batch without data, and what they need to be run."""
    with ExitStack() as stack:
        if job.mode != "replicate":
            stack.enter_context(_process_group(job.gpus))
        tokens, layout = _captions(job)
        model, mode = _build(job), FakeTensorMode()
        without_data(model, mode)
        if job.mode != "replicate":
            shard((model.visual, model.text), *job.sharding())
        stack.enter_context(mode)
        batch = _batch(job, tokens, layout, mode)
        if job.mode != "replicate":
            _gather_once(model)
        yield model, batch


def _shallow(job: Job, blocks: int) -> Job:
    config, options = job.config, dict(job.options)
    for part in ("vision", "text"):
        options[part] = {**options.get(part, {}), "layers": min(blocks, getattr(config, part).layers)}
    options["vision"]["patch_dropout"] = job.token_dropout
    return replace(job, options=options)


def _recorder(model: CLIP, batch: Batch) -> Recorder:
    """One that knows what there is before the step."""
    recorder = Recorder()
    for parameter in model.parameters():
        recorder.know(parameter, PARAMETERS)
    for value in tree_leaves((batch, list(model.buffers()))):
        if isinstance(value, Tensor):
            recorder.know(value, INPUTS)
    return recorder


def _gather_once(model: CLIP) -> None:
    """What sharding does at the first step only, which isn't recorded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    forget_gathered(model)


def _pass(model: CLIP, job: Job, batch: Batch, recorder: Recorder) -> None:
    """Forward and backward pass of one chunk."""
    with ExitStack() as stack:
        for handle in _hooks(model, recorder):
            stack.callback(handle.remove)
        with _autocast(job):
            features = model(batch.images, batch.tokens, token_index=batch.token_index, layout=batch.layout)[:2]
            recorder.mark(UNCAST)
        recorder.mark("loss")
        for value, name in zip(features, ("~image.head", "~text.head"), strict=True):
            value.register_hook(lambda _, name=name: recorder.mark(name))
        gradients = [torch.empty_like(value) for value in features]
        torch.autograd.backward(features, gradients)
        recorder.mark("end")


def _sizes(model: CLIP) -> tuple[dict[str, int], dict[str, int]]:
    sizes, elements = {}, {"rest": sum(local(p).numel() for p in model.parameters())}
    for name, tower in (("image", model.visual), ("text", model.text)):
        blocks = [module for module in tower.modules() if isinstance(module, ResidualBlock)]
        parameters = [local(parameter) for parameter in blocks[len(blocks) // 2].parameters()]
        sizes[name] = sum(parameter.untyped_storage().nbytes() for parameter in parameters)
        elements[name] = sum(parameter.numel() for parameter in parameters)
        elements["rest"] -= elements[name] * len(blocks)
    return sizes, elements


def _hooks(model: CLIP, recorder: Recorder) -> Iterator[Any]:
    """Marks where phases begin, forward and backward."""

    def before(name: str, backward: str, module: Any, args: Any) -> None:
        if torch._C._current_graph_task_id() >= 0:
            return
        recorder.mark(name)
        if args[0].requires_grad:
            args[0].register_hook(lambda _: recorder.mark(backward))

    def after(name: str, backward: str, module: Any, args: Any, output: Tensor) -> None:
        if torch._C._current_graph_task_id() >= 0:
            return
        recorder.mark(name)
        output.register_hook(lambda _: recorder.mark(backward))

    for name, tower in (("image", model.visual), ("text", model.text)):
        yield tower.register_forward_pre_hook(lambda _, args, name=name: recorder.mark(f"{name}.embed"), prepend=True)
        blocks = [module for module in tower.modules() if isinstance(module, ResidualBlock)]
        for index, block in enumerate(blocks):
            # The gradient of a block's input ends its own backward pass, and begins that of what is in front of it.
            previous = f"~{name}.block.{index - 1}" if index else f"~{name}.embed"
            yield block.register_forward_pre_hook(partial(before, f"{name}.block.{index}", previous), prepend=True)
        yield blocks[-1].register_forward_hook(partial(after, f"{name}.head", f"~{name}.block.{len(blocks) - 1}"))


def _build(job: Job) -> CLIP:
    precision = job.precision if job.precision in ("bf16", "fp16") else "fp32"
    model: CLIP = create_model(job.model, device="meta", precision=precision, savings=job.savings, **job.options)
    return model.train()


def _captions(job: Job) -> tuple[Tensor, Layout]:
    text = job.config.text
    tokens = caption_tokens(caption_lengths(job.chunk, job.caption_tokens, text.context_length), text)
    return tokens, Layout.packed(tokens) if job.savings.pack_text else Layout.padded(tokens)


def _batch(job: Job, tokens: Tensor, layout: Layout, mode: FakeTensorMode) -> Batch:
    vision = job.config.vision
    index = torch.empty(job.chunk, job.kept_patches, dtype=torch.int64) if job.token_dropout else None
    tokens, layout = tree_map_only(Tensor, mode.from_tensor, (tokens, layout))
    return Batch(torch.empty(job.chunk, 3, *vision.image_shape), tokens, index, layout)


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
