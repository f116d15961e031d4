"""AdamW as a `torch.optim.Optimizer`."""

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops.adamw import adamw_update
from ._device_optimizer import SWITCHES, Batch, DeviceOptimizer


class AdamW(DeviceOptimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); all tensors of all groups go through one op call.

    It computes the steps of `torch.optim.AdamW` and exchanges state dicts with it. Gradients may have another dtype
    than the parameters. Moments are float32 for 16-bit parameters, too; loaded moments keep their dtype.

    The step count is on the device, without synchronisation. `found_inf` and `grad_scale`, one-element tensors set as
    attributes (`torch.amp.GradScaler` does so), skip the step, uncounted, and divide the gradients; `grad` stays
    unchanged. See `evakernels.gradient_norm` for clipping.

    Args:
        params: parameters or groups; a group may set every option below.
        lr: learning rate; a number, or a tensor of one element, which each step reads. A CUDA graph keeps a number and
            follows a tensor on the GPU, which the host never reads.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: a step subtracts `lr * weight_decay` times the parameter.
        amsgrad, differentiable: must be False.
        maximize: maximise instead of minimise.
        foreach, fused, capturable: accepted without effect.
        stochastic_rounding: for bfloat16 parameters without float32 copies: round up with the probability of the
            fraction that is cut off, so that steps smaller than half a unit of bfloat16 add up. Equal on every device
            and for any number of threads and ranks, if the unrounded values are.
        seed: seed of the rounding, from 0 to below 2^31.

    Raises:
        TypeError, ValueError: for options out of range or not supported, also of groups and state dicts, stochastic
            rounding to other than bfloat16, and in `step` for sparse or complex gradients.
    """

    shared_options: ClassVar[tuple[str, ...]] = (*DeviceOptimizer.shared_options, "maximize")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        switches = dict(zip(SWITCHES, (amsgrad, maximize, foreach, capturable, differentiable, fused), strict=True))
        super().__init__(params, {**defaults, **switches, "stochastic_rounding": stochastic_rounding, "seed": seed})

    def step_batch(
        self, batch: Batch, options: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        adamw_update(
            batch.params,
            batch.grads,
            *batch.state,
            batch.rates,
            batch.weight_decays,
            grad_scale=grad_scale,
            found_inf=found_inf,
            seeds=batch.seeds,
            first_elements=batch.first_elements,
            **options,
        )
