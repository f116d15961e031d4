"""One process of many, the others of which aren't there: the real step, for what it holds."""

from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only

from evaclip.errors import UserError
from evaclip.factory import create_model
from evaclip.model.captions import Layout
from evaclip.plan.job import CAPTION_TOKENS
from evaclip.plan.memory import OPTIMIZER
from evaclip.plan.phases import Bytes, highest
from evaclip.plan.recorder import GRADIENTS, INPUTS, PARAMETERS, Recorder
from evaclip.plan.trace import caption_lengths, caption_tokens, without_data
from evaclip.train import rng
from evaclip.train.build import (
    build_step,
    is_cut_up,
    lock,
    model_options,
    precision_of_parameters,
    rows_of_processes,
)
from evaclip.train.config import TrainConfig
from evaclip.train.distributed import World, device_of
from evaclip.train.ema import Ema
from evaclip.train.sharding import shard


def pretended(device: str, size: int) -> World:
    """The world of the first of `size` processes, whose collectives return at once with whatever there is.

    Raises:
        UserError: there are processes already, or the device does not exist.
    """
    if size < 1:
        raise UserError(f"--as-gpus {size}; expected at least 1")
    if (dist.is_available() and dist.is_initialized()) or dist.is_torchelastic_launched():
        raise UserError("--as-gpus stands for many processes; start one, without torchrun")
    found = device_of(device)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    return World(found, 0, size, dist.group.WORLD, dist.group.WORLD, lambda: dist.group.WORLD)


def traced_peak(config: TrainConfig, world: World, caption_mean: int = CAPTION_TOKENS) -> Bytes:
    """Bytes by kind at the highest moment of a step.

    Model, optimizer, averaged weights, sharding and step are those of the run, on tensors without data. Moments are
    there from the start. What an operator allocates and frees inside itself isn't seen.

    Args:
        caption_mean: tokens of a caption, on average.

    Raises:
        UserError: under offload, as host memory and a GPU's can't be told apart here.
    """
    if config.parallel.offload != "none":
        raise UserError("--as-gpus under parallel.offload needs a GPU: without one, all memory is the host's")
    mode, batch = FakeTensorMode(), len(rows_of_processes(config, world)[0])
    options = model_options(config)
    precision = precision_of_parameters(config.precision)
    model = create_model(
        config.model.name, device="meta", precision=precision, savings=config.model.savings, **options
    ).train()
    without_data(model, mode)
    if is_cut_up(config, world):
        shard(model, config.parallel, config.precision, world)
    lock(model, config.model)
    tokens = caption_tokens(caption_lengths(batch, caption_mean, model.context_length), model.config.text)
    # Chunks differ by one at most.
    chunk = -(-batch // config.accumulation)
    lay_out = Layout.packed if config.model.savings.pack_text else Layout.padded
    layouts = {size: lay_out(tokens[:size]) for size in (batch // config.accumulation, chunk)}
    # States of random generators are read as numbers, and nothing is drawn here.
    with patch.multiple(rng, capture=lambda device: {}, restore=lambda state, device: None), mode:
        tokens, layouts = tree_map_only(Tensor, mode.from_tensor, (tokens, layouts))
        images = torch.empty(batch, 3, *model.config.vision.image_shape)
        step = build_step(config, world, model)
        ema = None if config.ema_decay is None else Ema(model, config.ema_decay)
        # Which rows a caption has can't be read from tokens without data.
        model.text.layout = lambda tokens: layouts[len(tokens)]  # type: ignore[method-assign]
        step(images, tokens, 0)
        step.optimizer.zero_grad()
        recorder = Recorder()
        # What isn't the present chunk's waits in host memory.
        present = [images[:chunk].clone(), tokens[:chunk].clone(), *model.buffers()]
        averages = list(ema.state_dict().values()) if ema else []
        moments = [value for state in step.optimizer.state.values() for value in state.values()]
        kinds = {PARAMETERS: model.parameters(), INPUTS: present, OPTIMIZER: moments, "averaged weights": averages}
        for kind, tensors in kinds.items():
            for tensor in tensors:
                recorder.know(tensor, kind)
        with recorder:
            step(images, tokens, 1)
            for parameter in step.parameters:
                if parameter.grad is not None:
                    recorder.relabel(parameter.grad, GRADIENTS)
            if ema:
                ema.update(1)
    return highest(recorder.recording)
