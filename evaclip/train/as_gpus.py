"""One process of many, the others of which aren't there: the real step, for what it holds."""

from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only

from evaclip.data.loader import part_of_batch
from evaclip.errors import UserError
from evaclip.plan.memory import OPTIMIZER
from evaclip.plan.phases import Bytes, highest
from evaclip.plan.recorder import FROZEN, GRADIENTS, INPUTS, PARAMETERS, Recorder
from evaclip.plan.trace import without_data
from evaclip.train import rng
from evaclip.train.build import build_step, check_batch, is_cut_up, precision_of_parameters
from evaclip.train.config import TrainConfig
from evaclip.train.distributed import World, device_of
from evaclip.train.ema import Ema
from evaclip.train.sharding import shard
from evaclip.train.tasks import task_class


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


def traced_peak(config: TrainConfig, world: World) -> Bytes:
    """Bytes by kind at the highest moment of a step.

    Model, optimizer, averaged weights, sharding and step are those of the run, on tensors without data. Moments are
    there from the start. What an operator allocates and frees inside itself isn't seen.

    Raises:
        UserError: under offload, as host memory and a GPU's can't be told apart here.
    """
    if config.parallel.offload != "none":
        raise UserError("--as-gpus under parallel.offload needs a GPU: without one, all memory is the host's")
    check_batch(config, world)
    kind, precision = task_class(config.task.name), precision_of_parameters(config.precision)
    together = kind.rows_together(config)
    mode, batch = FakeTensorMode(), len(part_of_batch(config.batch_size, world.rank, world.size, together))
    model = kind.create_model(config, device="meta", precision=precision).train()
    without_data(model, mode)
    if is_cut_up(config, world):
        shard(kind.towers_of(model).values(), config.parallel, config.precision, world)
    task = kind.build(config, world, model)
    chunks = {len(part_of_batch(batch, n, config.accumulation, together)) for n in range(config.accumulation)}
    targets = task.stand_ins(batch, chunks, partial(tree_map_only, Tensor, mode.from_tensor))
    # States of random generators are read as numbers, and nothing is drawn here.
    with patch.multiple(rng, capture=lambda device: {}, restore=lambda state, device: None), mode:
        images = torch.empty(batch, 3, *task.visual.config.image_shape)
        step = build_step(config, world, task)
        ema = None if config.ema_decay is None else Ema(model, config.ema_decay)
        step(images, targets, 0)
        step.optimizer.zero_grad()
        recorder = Recorder()
        # What isn't the present chunk's waits in host memory.
        largest = max(chunks)
        present = [images[:largest].clone(), targets[:largest].clone(), *model.buffers()]
        averages = list(ema.state_dict().values()) if ema else []
        moments = [value for state in step.optimizer.state.values() for value in state.values()]
        kinds = {PARAMETERS: model.parameters(), INPUTS: present, OPTIMIZER: moments, "averaged weights": averages}
        kinds[FROZEN] = task.beside()
        for name, tensors in kinds.items():
            for tensor in tensors:
                recorder.know(tensor, name)
        with recorder:
            step(images, targets, 1)
            for parameter in step.parameters:
                if parameter.grad is not None:
                    recorder.relabel(parameter.grad, GRADIENTS)
            if ema:
                ema.update(1)
    return highest(recorder.recording)
