"""LAMB as a `torch.optim.Optimizer`."""

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from evakernels.ops._shards import sum_over
from evakernels.ops.lamb import check_variant, lamb_apply, lamb_step, lamb_update
from evakernels.optim import _zero_slices
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
        zero_processes: None: each tensor has a trust ratio of its own. W: the ratios are those of DeepSpeed's LAMB
            inside ZeRO-1 on W processes, one for each W-th of a group's parameters, which lie one behind the other;
            for repeating such a run, on any number of processes. Each step then handles up to W more views a group.
        stochastic_rounding: for groups of bfloat16 parameters without float32 copies. What a step leaves is rounded up
            with the probability of the part that is cut off, so that steps smaller than half a unit of bfloat16 add up
            instead of being lost. The result is the same on every device and for any number of threads and, sharded, of
            processes, as far as what is rounded is.
        seed: of these roundings, from 0 to below 2^31.

    Raises:
        TypeError, ValueError: for options out of range, stochastic rounding to other than bfloat16, and in `step` for
            sparse or complex gradients.
    """

    shared_options: ClassVar[tuple[str, ...]] = (*DeviceOptimizer.shared_options, "variant", "zero_processes")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        variant: str = "deepspeed",
        zero_processes: int | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "variant": variant}
        rounding = {"stochastic_rounding": stochastic_rounding, "seed": seed}
        super().__init__(params, {**defaults, "zero_processes": zero_processes, **rounding})

    def check_options(self, options: dict[str, Any]) -> None:
        check_variant("Lamb", options["variant"])
        processes = options["zero_processes"]
        if processes is not None and (processes < 1 or options["variant"] != "deepspeed"):
            raise ValueError(
                f"Lamb: zero_processes is {processes} with variant {options['variant']!r}; "
                "accepted: None, or 1 or more with 'deepspeed'"
            )
        super().check_options(options)

    def parts_of(self, batch: Batch) -> Iterator[Batch]:
        """All at once where a trust ratio is that of several tensors."""
        sliced = any(group["zero_processes"] is not None for group in self.param_groups)
        return iter([batch]) if sliced else super().parts_of(batch)

    def step_batch(
        self, batch: Batch, options: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        options = {**options, "found_inf": found_inf}
        processes = options.pop("zero_processes")
        pieces = None if processes is None else _zero_slices.cut(batch, self.param_groups, processes)
        batch = batch if pieces is None else pieces.batch
        tensors, rates = (batch.params, batch.grads, *batch.state), (batch.lrs, batch.weight_decays)
        rounding: dict[str, Any] = {"seeds": batch.seeds, "first_elements": batch.first_elements}
        if pieces is None and not batch.shards:
            lamb_step(*tensors, *rates, grad_scale=grad_scale, **options | rounding)
            return
        norms = lamb_update(*tensors, batch.weight_decays, grad_scale=grad_scale, **options)
        if pieces is None:
            sum_over(norms, batch.shards)
        else:
            norms = pieces.sum_over_slices(norms)
        lamb_apply(batch.params, *batch.state, norms, *rates, **options | rounding)
