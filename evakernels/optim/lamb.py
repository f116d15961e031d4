"""LAMB as a `torch.optim.Optimizer`."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from evakernels.ops.lamb import check_variant, lamb_apply, lamb_update
from evakernels.reference._numerics import accumulation_dtype


class Lamb(Optimizer):
    """LAMB (You et al. 2020, arXiv 1904.00962); all tensors of all groups go through one op call a phase.

    The step count is on the device and nothing waits for it. `found_inf` and `grad_scale`, one-element
    tensors set as attributes (`torch.amp.GradScaler` does so), skip the step and divide the gradients on the
    device; a skipped step isn't counted. Moments are float32 for 16-bit parameters too, and stay so in
    `load_state_dict`.

    Args:
        params: parameters or groups; a group may set every option below for itself.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the moments, but inside the trust ratio.
        variant: `"deepspeed"` or `"nvlamb"`; see `evakernels.lamb_update`.

    Raises:
        TypeError, ValueError: for options out of range, and in `step` for sparse or complex gradients.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        variant: str = "deepspeed",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "variant": variant}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; see `torch.optim.Optimizer.add_param_group`."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the moments in the dtypes they were saved in; otherwise as the base class."""
        super().load_state_dict(state_dict)
        # The base class has rounded the moments to the dtype of the parameters and not moved the steps.
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for param, saved_id in zip(params, saved_ids, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                self.state[param][name] = value.to(param.device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step, but not for parameters without a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for (device, betas, eps, variant), batch in self._batches().items():
            options: dict[str, Any] = {"betas": betas, "eps": eps, "variant": variant}
            options["found_inf"] = self._flag("found_inf", device)
            grad_scale = self._flag("grad_scale", device)
            state = batch.exp_avgs, batch.exp_avg_sqs, batch.steps
            norms = lamb_update(
                batch.params, batch.grads, *state, batch.weight_decays, grad_scale=grad_scale, **options
            )
            lamb_apply(batch.params, *state, norms, batch.lrs, batch.weight_decays, **options)
        return loss

    def _batches(self) -> dict[tuple[Any, ...], "_Batch"]:
        """The tensors of each call: all in one unless groups differ in more than rate and decay."""
        batches: dict[tuple[Any, ...], _Batch] = defaultdict(_Batch)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    key = param.device, tuple(group["betas"]), group["eps"], group["variant"]
                    batches[key].add(param, self._state_of(param), group)
        return batches

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["step"] = torch.zeros((), device=param.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, dtype=accumulation_dtype(param))
        return state

    def _flag(self, name: str, device: torch.device) -> Tensor | None:
        flag: Tensor | None = getattr(self, name, None)
        return None if flag is None else flag.to(device, non_blocking=True)


@dataclass
class _Batch:
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    weight_decays: list[float] = field(default_factory=list)

    def add(self, param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        assert param.grad is not None
        self.params.append(param)
        self.grads.append(param.grad)
        self.exp_avgs.append(state["exp_avg"])
        self.exp_avg_sqs.append(state["exp_avg_sq"])
        self.steps.append(state["step"])
        self.lrs.append(group["lr"])
        self.weight_decays.append(group["weight_decay"])


def _check_options(options: dict[str, Any]) -> None:
    check_variant("Lamb", options["variant"])
    for name in ("lr", "eps", "weight_decay"):
        if isinstance(options[name], Tensor):
            raise TypeError(f"Lamb: {name} is a tensor; accepted: a number")
        if not options[name] >= 0.0:
            raise ValueError(f"Lamb: {name} is {options[name]}; accepted: 0 or more")
    if len(options["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in options["betas"]):
        raise ValueError(f"Lamb: betas are {options['betas']}; accepted: two numbers from 0 to below 1")
