"""Parameter groups with rates per tower and layer, and the optimizers: ours and timm's."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evaclip.errors import UserError, unknown_name
from evaclip.extras import install_command
from evaclip.train.config import TIMM, OptimConfig, TowerConfig
from evaclip.weights import is_dtensor
from evakernels import gradient_norm
from evakernels.optim import AdamW, Lamb

Group = dict[str, Any]

_GROUP = "group:"
"""Prefix of values that an optimizer keeps for a whole group, such as Adan's step count."""
_SEEDS = 1 << 31
_NEVER_DECAYED = ("pos_embed", "cls_token", "positional_embedding")


def parameter_groups(model: nn.Module, towers: Mapping[str, nn.Module], config: OptimConfig) -> list[Group]:
    """Groups of equal learning rate, weight decay, dtype and sharding, over the trainable parameters of the model.

    A tower's rate at depth d is `lr * layer_decay ** (depth + 1 - d)`: embeddings have d = 0, block i has d = i + 1,
    what comes after the blocks has d = depth + 1. Biases, norms, scales and position embeddings are not decayed. What
    belongs to no tower (logit_scale, logit_bias) has the optimizer's own rate.

    Returns:
        groups with `params`, `name`, `lr`, `peak_lr`, `frozen_steps` and `weight_decay`.
    """
    options_of = {"visual": config.visual, "text": config.text}
    places = {id(value): (tower, name) for tower in towers for name, value in towers[tower].named_parameters()}
    groups: dict[tuple[str, torch.dtype, bool], Group] = {}
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
        group = groups.setdefault(
            (label, parameter.dtype, is_dtensor(parameter)), {"name": label, **rates, "params": []}
        )
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
        # Norms, biases and scales are float32.
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


class TimmOptimizer(torch.optim.Optimizer):
    """An optimizer of timm with `grad_scale`, `found_inf` and `measured_step` as in `evakernels.optim`.

    A step reads `grad_scale` and `found_inf` on the host, so it waits for the device.

    Args:
        groups: parameter groups with their own rates and weight decays.
        config: `timm/NAME`, and the keyword arguments of that optimizer.

    Raises:
        UserError: timm is missing, has no such optimizer, or refuses the options.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        self._name = config.name
        self._optimizer = _create(groups, config)
        super().__init__(self._optimizer.param_groups, {})
        self.state = self._optimizer.state
        self._group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}
        self._options = set(self.param_groups[0])
        self._checked = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Divide the gradients by `grad_scale` in place and update, unless `found_inf` is 1; `closure` isn't called."""
        if self.found_inf is not None and self.found_inf.item():
            return
        if self.grad_scale is not None:
            scale = self.grad_scale.item()
            for group in self.param_groups:
                torch._foreach_div_([p.grad for p in group["params"] if p.grad is not None], scale)
        try:
            self._optimizer.step()
        except (NotImplementedError, RuntimeError, TypeError) as exc:
            is_other = self._checked or isinstance(exc, torch.OutOfMemoryError)
            if is_other or not any(map(is_dtensor, self._group_of)):
                raise
            raise self._not_sharded(str(exc).partition("\n")[0]) from exc
        if not self._checked:
            self._check_state()
            self._checked = True

    @torch.no_grad()
    def measured_step(self) -> dict[Tensor, Tensor]:
        """`step`, and for each parameter `[2]` the squared L2 norms of its old value and of its change.

        A copy of all parameters exists while it runs.
        """
        before = {parameter: parameter.clone() for parameter in self._group_of if parameter.grad is not None}
        self.step()
        return {
            parameter: torch.stack([gradient_norm([old]), gradient_norm([old - parameter])]).square()
            for parameter, old in before.items()
        }

    def values_of(self, parameter: Tensor) -> dict[str, Any]:
        """State of a parameter by kind: tensors, numbers, and what its group has beyond its options."""
        group = self._group_of.get(parameter, {})
        shared = {f"{_GROUP}{key}": group[key] for key in group.keys() - self._options}
        return {**self.state.get(parameter, {}), **shared}

    def put_value(self, parameter: Tensor, kind: str, value: Any) -> None:
        """Restore one of `values_of`."""
        group = self._group_of[parameter]
        if kind.startswith(_GROUP):
            group[kind.removeprefix(_GROUP)] = value
            return
        # As in torch, step counts are in host memory unless the update reads them on the device.
        if isinstance(value, Tensor) and (kind != "step" or group.get("capturable") or group.get("fused")):
            value = value.to(parameter.device)
        self.state[parameter][kind] = value

    def _check_state(self) -> None:
        for parameter, state in self.state.items():
            for kind, value in state.items():
                if not isinstance(value, Tensor | int | float | None):
                    raise UserError(
                        f"optim.name must be an optimizer with tensors and numbers as its state, got {self._name} "
                        f"with {kind} as {type(value).__name__}"
                    )
                if is_dtensor(parameter) and isinstance(value, Tensor):
                    # Checkpoints of any number of ranks hold shards of the parameter's shape, and whole numbers.
                    fits = value.shape == parameter.shape if value.ndim else True
                    if is_dtensor(value) != bool(value.ndim) or not fits:
                        raise self._not_sharded(f"its {kind} isn't sharded like the parameter")

    def _not_sharded(self, reason: str) -> UserError:
        return UserError(f"{self._name} can't update sharded parameters ({reason}); set parallel.mode=replicate")


def _create(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    try:
        from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers  # type: ignore[attr-defined]
    except ModuleNotFoundError as exc:
        raise UserError(f"the package timm is not installed: {install_command('clip')}") from exc
    name, names = config.name.removeprefix(TIMM).lower(), list(map(str, list_optimizers()))
    if name not in names:
        raise unknown_name("optim.name", config.name, [TIMM + each for each in names])
    info = get_optimizer_info(name)
    if info.second_order:
        raise UserError(f"optim.name must be a first-order optimizer, got {config.name}")
    # timm drops betas and eps where an optimizer has none.
    betas = {"betas": (config.beta1, config.beta2)} if info.num_betas == 2 else {}
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "eps": config.eps, **betas}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(groups, name, **{**options, **(config.options or {})})
    except (AssertionError, ImportError, TypeError, ValueError) as exc:
        raise UserError(f"optim.options must fit {config.name}, got {config.options or {}}: {exc}") from exc
    return optimizer
