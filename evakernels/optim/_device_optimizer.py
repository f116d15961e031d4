"""The base class of the optimizers on the library's ops."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from itertools import count, groupby
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..ops import _check
from ..ops._dtensors import first_local_element, local, shard_groups, sum_over
from ..reference import accumulation_dtype

SWITCHES = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused")
"""Options of torch's optimizers."""

_REFUSED = ("amsgrad", "differentiable")
_STATE = {"step", "exp_avg", "exp_avg_sq"}


@dataclass
class Batch:
    """The tensors of one call, this rank's shards of DTensors, and their groups' options.

    Attributes:
        shards: the process groups over which the tensors are sharded.
        owners: the parameters.
        seeds, first_elements: as for `evakernels.adamw_update`; empty without stochastic rounding.
    """

    shards: tuple[Any, ...] = ()
    owners: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    lrs: list[float | Tensor] = field(default_factory=list)
    weight_decays: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    first_elements: list[int] = field(default_factory=list)

    @property
    def state(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return self.exp_avgs, self.exp_avg_sqs, self.steps

    @property
    def rates(self) -> list[float] | Tensor:
        """The learning rates; `[n]` on the device if one of them is there, so that the host needn't read it."""
        if not any(isinstance(lr, Tensor) for lr in self.lrs):
            return self.lrs  # type: ignore[return-value]
        device = self.params[0].device
        parts = []
        for _, run in groupby(self.lrs, key=lambda lr: lr.data_ptr() if isinstance(lr, Tensor) else lr):
            lr, *others = run
            if not isinstance(lr, Tensor):
                lr = torch.full((), lr, device=device)
            parts.append(lr.to(device, torch.float32).expand(1 + len(others)))
        return torch.cat(parts)

    def add(self, param: Tensor, number: int, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Adds the parameter with index `number` in the optimizer."""
        assert param.grad is not None
        self.owners.append(param)
        self.params.append(local(param))
        self.grads.append(local(param.grad))
        self.exp_avgs.append(local(state["exp_avg"]))
        self.exp_avg_sqs.append(local(state["exp_avg_sq"]))
        self.steps.append(state["step"])
        lr = group["lr"]
        self.lrs.append(lr.reshape(()) if _is_on_device(lr) else float(lr))
        self.weight_decays.append(group["weight_decay"])
        if group.get("stochastic_rounding"):
            self.seeds.append(group["seed"] << 32 | number)
            self.first_elements.append(first_local_element(param))

    def parts(self) -> Iterator["Batch"]:
        """The same tensors in order, in batches of at most the largest tensor's number of elements."""
        # Sizes of whole tensors, so that all ranks have the same batches.
        limit = max(owner.numel() for owner in self.owners)
        start = size = 0
        for end, owner in enumerate(self.owners):
            if size + owner.numel() > limit:
                yield self._part(slice(start, end))
                start, size = end, 0
            size += owner.numel()
        yield self._part(slice(start, len(self.owners)))

    def _part(self, where: slice) -> "Batch":
        lists = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "shards"}
        return Batch(self.shards, **{name: values[where] for name, values in lists.items()})


class DeviceOptimizer(Optimizer):
    """An optimizer with two moments and one op call per step over all tensors of all groups.

    Parameters may be DTensors: each rank updates its shards, and the moments are DTensors, too.
    """

    shared_options: ClassVar[tuple[str, ...]] = ("betas", "eps")
    """Options that are equal for all tensors of a call."""

    _step_supports_amp_scaling = True

    @abstractmethod
    def step_batch(
        self, batch: Batch, options: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Updates these tensors; `options` are the shared ones except `maximize`."""

    def check_options(self, options: dict[str, Any]) -> None:
        """Raises for options of a group that are out of range."""
        name = type(self).__name__
        for option in _REFUSED:
            if options.get(option):
                raise ValueError(f"{name}: {option} must be False, got {options[option]}")
        for option in ("lr", "eps", "weight_decay"):
            if isinstance(options[option], Tensor):
                _check_tensor(name, option, options[option])
            else:
                _check.number(name, option, options[option], "0 or more")
            if not _is_on_device(options[option]) and not options[option] >= 0.0:
                raise ValueError(f"{name}: {option} must be 0 or more, got {options[option]}")
        _check.betas(name, options["betas"])
        if not 0 <= options.get("seed", 0) < 1 << 31:
            raise ValueError(f"{name}: seed must be from 0 to below 2^31, got {options['seed']}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; see `torch.optim.Optimizer.add_param_group`."""
        self.check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        for number, param in enumerate(added["params"]):
            strides = param.stride() if param.layout == torch.strided else param.shape
            if any(stride == 0 and size > 1 for size, stride in zip(param.shape, strides, strict=True)):
                self.param_groups.pop()
                name = added.get("param_names", {number: f"parameter {number} of a group"})[number]
                raise ValueError(
                    f"{type(self).__name__}: {name} must not be expanded, got shape {tuple(param.shape)} with strides "
                    f"{param.stride()}: clone() makes a tensor whose elements are all in memory"
                )
        others = {param.dtype for param in added["params"]} - {torch.bfloat16}
        if added.get("stochastic_rounding") and others:
            self.param_groups.pop()
            raise TypeError(
                f"{type(self).__name__}: stochastic_rounding must be False in groups of other dtypes than "
                f"torch.bfloat16, got True with {', '.join(sorted(map(str, others)))}"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Groups that were saved without some options, such as torch's, get this optimizer's defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for option, default in self.defaults.items():
                group.setdefault(option, default)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the moments in their saved dtypes, and step counts as float32.

        A learning rate on a device becomes a number, unless this group's is on a device: it then takes the value.

        Raises `ValueError` for options out of range or not supported, and for another optimizer's state.
        """
        for saved in state_dict["state"].values():
            if saved and not saved.keys() >= _STATE:
                accepted = ", ".join(sorted(_STATE))
                raise ValueError(f"{type(self).__name__}: state must be {accepted}, got {', '.join(saved)}")
        groups = [{**group, "lr": _on_host(group["lr"])} for group in state_dict["param_groups"]]
        for current, group in zip(self.param_groups, groups, strict=False):
            self.check_options({**self.defaults, **current, **group})
            if _is_on_device(current["lr"]):
                group["lr"] = current["lr"].fill_(group["lr"])
        state_dict = {**state_dict, "param_groups": groups}
        super().load_state_dict(state_dict)
        for current, group in zip(self.param_groups, groups, strict=True):
            if _is_on_device(group["lr"]):
                current["lr"] = group["lr"]  # the base class copies it, but a captured graph reads this tensor
        # The base class casts the moments to the dtype of the parameters and doesn't move the steps.
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for param, saved_id in zip(params, saved_ids, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                dtype = torch.float32 if name == "step" else value.dtype
                self.state[param][name] = torch.as_tensor(value, device=param.device).to(dtype, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters with a gradient; returns the result of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for key, batch in self._batches().items():
            self._step_on_batch(key, batch)
        return loss

    @torch.no_grad()
    def measured_step(self) -> dict[Tensor, Tensor]:
        """Makes the same step as `step`, bit-exact, and returns how far it moved each parameter.

        It copies a few tensors at a time, of at most the largest parameter's size, with more launches than `step`, and
        with more all-reduces of LAMB's shards. Nothing is synchronised.

        Returns:
            For each parameter with a gradient `[2]`: squared L2 norms of the old value and of the stored change,
            float32 (float64 for a float64 parameter); for DTensors of the whole tensor.
        """
        result: dict[Tensor, Tensor] = {}
        for key, batch in self._batches().items():
            norms = torch.stack([squares for part in batch.parts() for squares in self._measured(key, part)])
            sum_over(norms, batch.shards)
            result.update(zip(batch.owners, norms, strict=True))
        return result

    def _measured(self, key: tuple[Any, ...], batch: Batch) -> list[Tensor]:
        before = [param.clone() for param in batch.params]
        self._step_on_batch(key, batch)
        return [
            torch.stack([_square(old), _square(old.sub_(param))])
            for param, old in zip(batch.params, before, strict=True)
        ]

    def _step_on_batch(self, key: tuple[Any, ...], batch: Batch) -> None:
        device, _, _, *shared = key
        options = dict(zip(self.shared_options, shared, strict=True))
        grad_scale = self._flag("grad_scale", device)
        if options.pop("maximize", False):
            grad_scale = torch.full((), -1.0, device=device) if grad_scale is None else -grad_scale
        self.step_batch(batch, options, grad_scale, self._flag("found_inf", device))

    def _batches(self) -> dict[tuple[Any, ...], Batch]:
        """The tensors of each call, by device, shards, rounding and shared options."""
        batches: dict[tuple[Any, ...], Batch] = defaultdict(Batch)
        numbers = count()
        for group in self.param_groups:
            shared = {**group, "betas": tuple(group["betas"])}  # hashable
            rounding = bool(group.get("stochastic_rounding"))
            for param, number in zip(group["params"], numbers, strict=False):
                if param.grad is not None:
                    shards = shard_groups(param)
                    key = param.device, shards, rounding, *(shared[option] for option in self.shared_options)
                    batches[key].shards = shards
                    batches[key].add(param, number, self._param_state(param), group)
        return batches

    def _param_state(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, dtype=accumulation_dtype(param))
        return state

    def _flag(self, name: str, device: torch.device) -> Tensor | None:
        flag: Tensor | None = getattr(self, name, None)
        # A non-blocking copy to the host may be read before it has arrived.
        return None if flag is None else flag.to(device, non_blocking=device.type != "cpu").reshape(())


def _check_tensor(name: str, option: str, value: Tensor) -> None:
    if option != "lr":
        raise TypeError(f"{name}: {option} must be a number, got a tensor")
    if value.numel() != 1:
        raise TypeError(f"{name}: lr must be a number or a tensor of one element, got shape {tuple(value.shape)}")


def _is_on_device(lr: Any) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _on_host(lr: Any) -> Any:
    return float(lr) if _is_on_device(lr) else lr


def _square(value: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(value, dtype=accumulation_dtype(value))
    return norm.square()
