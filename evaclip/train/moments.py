"""The optimizer's state by the parameters' names, so that it fits whatever groups and shards go on with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaclip.errors import UserError
from evaclip.weights import parts


def take(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Moments as `NAME.KIND`, and those without dimensions (with the step counts) apart, which are whole everywhere."""
    state = {
        f"{name}.{kind}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    moments = {name: value for name, value in state.items() if value.ndim}
    return moments, {name: value for name, value in state.items() if not value.ndim}


def put_back(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, scalars: Mapping[str, Tensor]) -> None:
    """Restores what `take` gave, in the dtypes it had; rates and decays stay those of the present configuration.

    What isn't trained any more gets none.

    Raises:
        UserError: a moment is of a parameter that doesn't exist, or that has another shape.
    """
    parameters = dict(model.named_parameters())
    moments: dict[str, Tensor] = {}
    for key, like in parts.likes(folder).items():
        parameter = _parameter(parameters, key)
        if parameter.shape != like.shape:
            raise UserError(f"the moment {key} is {list(like.shape)}, the parameter {list(parameter.shape)}")
        if parameter.requires_grad:
            moments[key] = torch.zeros_like(parameter, dtype=like.dtype)
    parts.read(moments, folder)
    optimizer.state.clear()
    for key, value in {**moments, **scalars}.items():
        parameter = _parameter(parameters, key)
        if parameter.requires_grad:
            optimizer.state[parameter][key.rpartition(".")[2]] = value.to(parameter.device)


def _parameter(parameters: Mapping[str, nn.Parameter], key: str) -> nn.Parameter:
    name = key.rpartition(".")[0]
    if name not in parameters:
        raise UserError(f"there is no parameter {name}")
    return parameters[name]
