"""Parameter groups with per-tower learning rate, weight decay and layer decay, and the optimizers on top of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from evaclip.train.config import TIMM, OptimConfig, TowerConfig
from evaclip.train.timm_optimizer import TimmOptimizer
from evakernels.optim import AdamW, Lamb

Group = dict[str, Any]

_SEEDS = 1 << 31
_NEVER_DECAYED = ("pos_embed", "cls_token", "positional_embedding")


def parameter_groups(model: nn.Module, towers: Mapping[str, nn.Module], config: OptimConfig) -> list[Group]:
    """Groups of equal learning rate and weight decay, over the trainable parameters of the model.

    A tower's rate at depth d is `lr * layer_decay ** (depth + 1 - d)`: embeddings have d = 0, block i has d = i + 1,
    what comes after the blocks has d = depth + 1. Biases, norms, scales and position embeddings are not decayed. What
    belongs to no tower (logit_scale, logit_bias) has the optimizer's own rate.

    Returns:
        groups with `params`, `name`, `lr`, `peak_lr`, `frozen_steps` and `weight_decay`.
    """
    options_of = {"visual": config.visual, "text": config.text}
    places = {id(value): (tower, name) for tower in towers for name, value in towers[tower].named_parameters()}
    groups: dict[str, Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower, inner = places.get(id(parameter), (name.partition(".")[0], name))
        decayed = parameter.ndim > 1 and inner.rpartition(".")[2] not in _NEVER_DECAYED
        label = "decay" if decayed else "no_decay"
        if tower in options_of:
            options = options_of[tower]
            lr, layer = _layer_rate(towers[tower], inner, options, config.lr)
            decay = config.weight_decay if options.weight_decay is None else options.weight_decay
            label, frozen = f"{tower}.{layer}{label}", options.frozen_steps
        else:
            lr, decay, label, frozen = config.lr, config.weight_decay, f"{tower}.{label}", 0
        rates = {"lr": lr, "peak_lr": lr, "frozen_steps": frozen, "weight_decay": decay if decayed else 0.0}
        group = groups.setdefault(label, {"name": label, **rates, "params": []})
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(groups: list[Group], config: OptimConfig, seed: int = 0) -> torch.optim.Optimizer:
    """Build the optimizer of these groups.

    All kinds divide the gradients by their attribute `grad_scale` and skip a step when their `found_inf` is 1.

    Raises:
        UserError: timm is missing, has no such optimizer, or refuses the options.
    """
    if config.name.startswith(TIMM):
        return TimmOptimizer(groups, config)
    for group in groups:
        # SigLIP's bias stays in float32.
        bfloat16 = all(parameter.dtype == torch.bfloat16 for parameter in group["params"])
        group["stochastic_rounding"] = config.stochastic_rounding and bfloat16
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    options["seed"] = seed % _SEEDS
    if config.name == "adamw":
        return AdamW(groups, **options)
    return Lamb(groups, **options, variant="deepspeed")


def set_lr_factor(optimizer: torch.optim.Optimizer, factor: float, step: int) -> None:
    """Sets every group's rate to this share of its peak, or to 0 while its tower is frozen at this step."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if step < group["frozen_steps"] else group["peak_lr"] * factor


def tower_rate(optimizer: torch.optim.Optimizer, tower: str) -> float:
    """The largest rate of a tower's groups at present; 0 for a tower that isn't trained."""
    groups = optimizer.param_groups
    return max((float(group["lr"]) for group in groups if group["name"].startswith(f"{tower}.")), default=0.0)


def _layer_rate(tower: Any, name: str, options: TowerConfig, default_lr: float) -> tuple[float, str]:
    lr = default_lr if options.lr is None else options.lr
    if options.layer_decay == 1.0:
        return lr, ""
    layer = tower.layer_id(name)
    return lr * options.layer_decay ** (tower.num_layer_ids - 1 - layer), f"layer{layer:02d}."
