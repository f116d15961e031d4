"""AdamW as a `torch.optim.Optimizer`."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from evakernels.ops.adamw import adamw_update
from evakernels.optim._device_optimizer import Batch, DeviceOptimizer

_NOT_OFFERED = ("amsgrad", "maximize")


class AdamW(DeviceOptimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); all tensors of all groups go through one op call.

    It computes what `torch.optim.AdamW` does and exchanges state dicts with it. What it has beyond that: groups cost
    nothing, gradients may be in another dtype than the parameters, and moments are float32 for 16-bit parameters too;
    those of a loaded state dict stay in the dtype that they were saved in.

    The step count is on the device and nothing waits for it. `found_inf` and `grad_scale`, one-element
    tensors set as attributes (`torch.amp.GradScaler` does so), skip the step and divide the gradients on the
    device, where `grad` itself stays as it is; a skipped step isn't counted. See `evakernels.gradient_norm` for
    clipping.

    Args:
        params: parameters or groups; a group may set every option below for itself.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: a step takes `lr * weight_decay` of a parameter away.
        stochastic_rounding: for groups of bfloat16 parameters without float32 copies. What a step leaves is rounded up
            with the probability of the part that is cut off, so that steps smaller than half a unit of bfloat16 add up
            instead of being lost. The result is the same on every device and for any number of threads and, sharded, of
            processes, as far as what is rounded is.
        seed: of these roundings, from 0 to below 2^31.

    Raises:
        TypeError, ValueError: for options out of range, stochastic rounding to other than bfloat16, in `step` for
            sparse or complex gradients, and for groups or state dicts with torch's options `amsgrad` and `maximize`,
            which aren't offered.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "stochastic_rounding": stochastic_rounding, "seed": seed})

    def check_options(self, options: dict[str, Any]) -> None:
        for option in _NOT_OFFERED:
            if options.get(option):
                raise ValueError(f"AdamW: {option} is {options[option]}; accepted: False")
        super().check_options(options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state dict of this class or of `torch.optim.AdamW`, its moments in the dtypes they have."""
        for group in state_dict["param_groups"]:
            self.check_options({**self.defaults, **group})
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["step"] = state["step"].to(torch.float32)  # torch counts in its default dtype

    def step_batch(
        self, batch: Batch, options: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        adamw_update(
            batch.params,
            batch.grads,
            *batch.state,
            batch.lrs,
            batch.weight_decays,
            grad_scale=grad_scale,
            found_inf=found_inf,
            seeds=batch.seeds,
            first_elements=batch.first_elements,
            **options,
        )
