"""The trainer's step on a CLIP, made without a run."""

import torch

from evaclip.data import Batch
from evaclip.model.clip import CLIP
from evaclip.train.config import LossConfig, OptimConfig
from evaclip.train.distributed import World
from evaclip.train.loss import ContrastiveLoss
from evaclip.train.optimizer import Group, build_optimizer, parameter_groups
from evaclip.train.step import StepOptions, TrainStep
from evaclip.train.tasks.contrastive import Contrastive


def groups_of(model: CLIP, config: OptimConfig) -> list[Group]:
    return parameter_groups(model, Contrastive.towers_of(model), config)


def random_batch(dtype=torch.float32, rows=8):
    """Images and captions."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(rows, 3, 16, 16, generator=generator, dtype=dtype)
    tokens = torch.randint(1, 40_000, (rows, 16), generator=generator)
    tokens[:, 7] = 49_407
    return images, tokens


def as_batch(images, targets):
    return Batch([images], targets)


def contrastive_step(model, optim, options=None, loss=None):
    task = Contrastive(model, ContrastiveLoss(loss or LossConfig()))
    optimizer = build_optimizer(groups_of(model, optim), optim)
    return TrainStep(task, optimizer, options or StepOptions(), World(torch.device("cpu")))
