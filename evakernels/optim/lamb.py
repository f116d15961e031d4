"""LAMB as a `torch.optim.Optimizer`."""

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops._dtensors import sum_over
from ..ops.lamb import check_variant, lamb_apply, lamb_step, lamb_update
from ._device_optimizer import SWITCHES, Batch, DeviceOptimizer


class Lamb(DeviceOptimizer):
    """LAMB (You et al. 2020, arXiv 1904.00962); all tensors of all groups go through one op call.

    The trust ratio covers the whole tensor, also under `fully_shard`: one all-reduce sums the squared norms of all
    tensors, two numbers each. Other arguments, the state and errors are as for `AdamW`.

    Args:
        weight_decay: decoupled from the moments, but inside the trust ratio.
        variant: `"nvlamb"`, the form of the paper, apex and timm, or `"deepspeed"`, the form that EVA-CLIP was trained
            with; see `evakernels.lamb_update`. Neither clips gradients, as apex and timm do by default.
    """

    shared_options: ClassVar[tuple[str, ...]] = (*DeviceOptimizer.shared_options, "maximize", "variant")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        variant: str = "nvlamb",
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "variant": variant}
        rounding = {"stochastic_rounding": stochastic_rounding, "seed": seed}
        switches = dict(zip(SWITCHES, (amsgrad, maximize, foreach, capturable, differentiable, fused), strict=True))
        super().__init__(params, {**defaults, **switches, **rounding})

    def check_options(self, options: dict[str, Any]) -> None:
        check_variant("Lamb", options["variant"])
        super().check_options(options)

    def step_batch(
        self, batch: Batch, options: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        make_step(batch, grad_scale=grad_scale, found_inf=found_inf, **options)


def make_step(batch: Batch, *, grad_scale: Tensor | None, found_inf: Tensor | None, **options: Any) -> None:
    """Makes one step in place; norms of shards are summed between its phases."""
    tensors, rates = (batch.params, batch.grads, *batch.state), (batch.rates, batch.weight_decays)
    options["found_inf"] = found_inf
    rounding: dict[str, Any] = {"seeds": batch.seeds, "first_elements": batch.first_elements}
    if not batch.shards:
        lamb_step(*tensors, *rates, grad_scale=grad_scale, **options | rounding)
        return
    norms = lamb_update(*tensors, batch.weight_decays, grad_scale=grad_scale, **options)
    sum_over(norms, batch.shards)
    lamb_apply(batch.params, *batch.state, norms, *rates, **options | rounding)
