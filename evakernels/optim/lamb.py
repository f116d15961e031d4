"""LAMB as a `torch.optim.Optimizer`."""

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from evakernels.ops._shards import sum_over
from evakernels.ops.lamb import check_variant, lamb_apply, lamb_step, lamb_update
from evakernels.optim._device_optimizer import Batch, DeviceOptimizer


class Lamb(DeviceOptimizer):
    """LAMB (You et al. 2020, arXiv 1904.00962); all tensors of all groups go through one op call.

    The trust ratio is that of the whole tensor also where `fully_shard` has cut it up: between the phases the squared
    norms of all tensors are summed over the processes, one all-reduce of two numbers a tensor.

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

    shared_options: ClassVar[tuple[str, ...]] = (*DeviceOptimizer.shared_options, "variant")

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

    def check_options(self, options: dict[str, Any]) -> None:
        check_variant("Lamb", options["variant"])
        super().check_options(options)

    def step_batch(
        self, batch: Batch, options: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        tensors, decays = (batch.params, batch.grads, *batch.state), batch.weight_decays
        options = {**options, "found_inf": found_inf}
        if not batch.shards:
            lamb_step(*tensors, batch.lrs, decays, grad_scale=grad_scale, **options)
            return
        norms = lamb_update(*tensors, decays, grad_scale=grad_scale, **options)
        sum_over(norms, batch.shards)
        lamb_apply(batch.params, *batch.state, norms, batch.lrs, decays, **options)
