"""The optimizer's state by the parameters' names, so that it fits whatever groups and shards go on with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaclip.errors import UserError
from evaclip.train.timm_optimizer import TimmOptimizer
from evaclip.weights import parts


def take(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Moments as `NAME.KIND`, and apart from them numbers and 0-D tensors such as step counts, equal on all ranks."""
    values_of = optimizer.values_of if isinstance(optimizer, TimmOptimizer) else lambda p: optimizer.state.get(p, {})
    state = {
        f"{name}.{kind}": value
        for name, parameter in model.named_parameters()
        for kind, value in values_of(parameter).items()
    }
    moments = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.ndim}
    return moments, {name: value for name, value in state.items() if name not in moments}


def put_back(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, scalars: Mapping[str, Any]) -> None:
    """Restore the result of `take` in its dtypes; rates and decays stay those of the present configuration.

    Parameters that aren't trained any more get no state.

    Raises:
        UserError: a moment is of a parameter that doesn't exist, or that has another shape.
    """
    parameters, is_timms = dict(model.named_parameters()), isinstance(optimizer, TimmOptimizer)
    moments: dict[str, Tensor] = {}
    for key, like in parts.likes(folder).items():
        parameter = _parameter(parameters, key)
        if parameter.shape != like.shape and not is_timms:
            raise UserError(f"the moment {key} is {list(like.shape)}, the parameter {list(parameter.shape)}")
        if parameter.requires_grad:
            same = parameter.shape == like.shape  # Adafactor has rows and columns of a matrix
            moments[key] = torch.zeros_like(parameter if same else like, dtype=like.dtype, device=parameter.device)
    parts.read(moments, folder)
    optimizer.state.clear()
    for key, value in {**moments, **scalars}.items():
        parameter, kind = _parameter(parameters, key), key.rpartition(".")[2]
        if not parameter.requires_grad:
            continue
        if isinstance(optimizer, TimmOptimizer):
            optimizer.put_value(parameter, kind, value)
        else:
            optimizer.state[parameter][kind] = value.to(parameter.device)


def _parameter(parameters: Mapping[str, nn.Parameter], key: str) -> nn.Parameter:
    name = key.rpartition(".")[0]
    if name not in parameters:
        raise UserError(f"there is no parameter {name}")
    return parameters[name]
