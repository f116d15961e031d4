"""What the tests ask of a family of models."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Family:
    """`build` makes the model, `inputs(seed)` its arguments, `features` calls it; `ops` are what it then runs on."""

    build: Callable[[], nn.Module]
    ops: set[str]
    inputs: Callable[[int], dict[str, Any]]
    features: Callable[[nn.Module, dict[str, Any]], Tensor]


def randomised(build: Callable[[], nn.Module]) -> nn.Module:
    """Random values in every parameter: a layer scale of 1e-5 or a bias of zero would hide what they multiply."""
    torch.manual_seed(0)
    model = build()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            nn.init.normal_(parameter, float(parameter.detach().mean()), 0.1)
        if "gamma" in name or "lambda1" in name:
            nn.init.uniform_(parameter, 0.3, 0.7)
        if name.startswith("head."):
            nn.init.normal_(parameter, 0, 0.1)
    return model.eval()


def run(family: Family, model: nn.Module, seed: int) -> Tensor:
    """The features for the inputs of this seed; the modules draw from the same one."""
    torch.manual_seed(seed)
    return family.features(model, family.inputs(seed))


def gradients(family: Family, model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Of a loss in which every feature has a weight of its own."""
    model.zero_grad()
    out = run(family, model, seed)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class _Log(TorchDispatchMode):
    def __init__(self, ops: set[str]) -> None:
        super().__init__()
        self.ops = ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "evakernels":
            self.ops.add(name.removesuffix("_forward"))
        return func(*args, **(kwargs or {}))


@contextmanager
def log_ops() -> Iterator[set[str]]:
    """Fills the set with the names of the ops that run inside the `with` block."""
    ops: set[str] = set()
    with _Log(ops):
        yield ops


def ops_of(family: Family, model: nn.Module) -> set[str]:
    """The ops that a call runs."""
    with log_ops() as ops, torch.no_grad():
        run(family, model, 0)
    return ops
