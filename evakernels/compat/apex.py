"""NVIDIA apex's fused norms and optimizers, with its signatures and state, without apex.

    from evakernels.compat.apex import FusedAdam, FusedLAMB, FusedLayerNorm, MixedFusedRMSNorm

in the place of `from apex.normalization import ...` and `from apex.optimizers import ...` is the whole change. All of
it also runs on a CPU. State dicts go both ways.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from evakernels.compat._missing import missing
from evakernels.nn.layer_norm import over_trailing
from evakernels.ops import adamw_update, gradient_norm, layer_norm, rms_norm
from evakernels.ops._autocast import is_on
from evakernels.ops._shards import local, sum_over
from evakernels.optim._device_optimizer import Batch, DeviceOptimizer
from evakernels.optim.lamb import make_step
from evakernels.reference._numerics import accumulation_dtype
from evakernels.reference._optimizer import bias, changed_moments, write

__all__ = [
    "FusedAdam",
    "FusedLAMB",
    "FusedLayerNorm",
    "FusedRMSNorm",
    "MixedFusedLayerNorm",
    "MixedFusedRMSNorm",
]

__getattr__ = missing(
    __name__,
    {
        "fused_layer_norm fused_layer_norm_affine mixed_dtype_fused_layer_norm_affine": "use evakernels.layer_norm",
        "fused_rms_norm fused_rms_norm_affine mixed_dtype_fused_rms_norm_affine manual_rms_norm": "use "
        "evakernels.rms_norm",
        "FusedSGD FusedNovoGrad FusedAdagrad FusedMixedPrecisionLamb": "FusedAdam and FusedLAMB are served",
    },
)


# --- norms ----------------------------------------------------------------------------------------------------------


class _FusedNorm(nn.Module):
    """What apex's norms share: any number of trailing dimensions, and under autocast a result in its dtype."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, SupportsIndex) else normalized_shape
        self.normalized_shape = torch.Size(shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        # apex keeps the output in the place of the input then; here the statistics of a row are all that is added.
        self.memory_efficient = memory_efficient
        for name in self._parameter_names():
            self.register_parameter(
                name, nn.Parameter(torch.empty(self.normalized_shape)) if elementwise_affine else None
            )
        self.reset_parameters()

    def _parameter_names(self) -> tuple[str, ...]:
        return ("weight", "bias")

    def reset_parameters(self) -> None:
        """Sets the weight to 1 and the bias to 0."""
        for name, parameter in self.named_parameters(recurse=False):
            nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., *normalized_shape]` to the same shape."""
        device = input.device.type
        if not is_on(device):
            return self._normalised(input)
        input = input.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return self._normalised(input)

    def _normalised(self, x: Tensor) -> Tensor:
        parameters = [
            None if p is None else p.to(torch.promote_types(p.dtype, x.dtype))
            for p in (getattr(self, name) for name in self._parameter_names())
        ]
        return self._norm(x, *parameters)

    def _norm(self, x: Tensor, *parameters: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
        norm: Callable[..., Tensor] = layer_norm if len(parameters) == 2 else rms_norm
        return over_trailing(self, norm, x, self.normalized_shape, *parameters, out_dtype=out_dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.normalized_shape)}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class FusedLayerNorm(_FusedNorm):
    """apex's `FusedLayerNorm`: LayerNorm over the trailing dimensions, in the dtype of the input.

    Args:
        normalized_shape: size of the last dimension, or sizes of the last dimensions.
        eps: added to the variance.
        elementwise_affine: whether there are a weight and a bias, of this shape.
        memory_efficient: accepted, and without effect.
    """


class FusedRMSNorm(_FusedNorm):
    """apex's `FusedRMSNorm`: RMSNorm over the trailing dimensions. Arguments as of `FusedLayerNorm`."""

    def _parameter_names(self) -> tuple[str, ...]:
        return ("weight",)


class _Mixed(_FusedNorm):
    """The result is in the dtype of the weight, whatever that of the input."""

    weight: nn.Parameter

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float = 1e-5, *, memory_efficient: bool = False, **kwargs: Any
    ) -> None:
        if not kwargs.pop("elementwise_affine", True):
            raise RuntimeError(f"{type(self).__name__}: elementwise_affine is False; accepted: True")
        if kwargs:
            raise TypeError(f"{type(self).__name__}: unknown arguments {', '.join(kwargs)}; accepted: memory_efficient")
        super().__init__(normalized_shape, eps, True, memory_efficient)

    def forward(self, input: Tensor) -> Tensor:
        parameters = (getattr(self, name) for name in self._parameter_names())
        return self._norm(input, *parameters, out_dtype=self.weight.dtype)


class MixedFusedLayerNorm(_Mixed, FusedLayerNorm):
    """apex's `MixedFusedLayerNorm`: `FusedLayerNorm` whose result is in the dtype of the weight."""


class MixedFusedRMSNorm(_Mixed, FusedRMSNorm):
    """apex's `MixedFusedRMSNorm`: `FusedRMSNorm` whose result is in the dtype of the weight."""


# --- optimizers -----------------------------------------------------------------------------------------------------

_NO_CORRECTION = float(1 << 24)
"""A number of steps after which bias correction is 1 in float32, for betas below 1 - 1e-6."""


class _ApexOptimizer(DeviceOptimizer):
    """apex counts the steps of a group, in the group; inside, each tensor has its count on the device."""

    set_grad_none: bool

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Sets gradients to None, or to zero where `set_grad_none` is False."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def measured_step(self) -> dict[Tensor, Tensor]:
        """Not offered, as apex has none."""
        raise NotImplementedError(f"{type(self).__name__} has no measured_step; evakernels.optim's optimizers have one")

    def state_dict(self) -> dict[str, Any]:
        """apex's: a group's `step` is an int, the largest among its tensors."""
        packed = super().state_dict()
        packed["state"] = {i: dict(state) for i, state in packed["state"].items()}
        for group in packed["param_groups"]:
            steps = [packed["state"][i].pop("step") for i in group["params"] if i in packed["state"]]
            group["step"] = max((int(step) for step in steps), default=0)
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what apex's class or this one has saved."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        state = {i: dict(of_param) for i, of_param in state_dict["state"].items()}
        for group in groups:
            step = float(group.pop("step", 0))
            for i in group["params"]:
                if i in state:
                    state[i].setdefault("step", step)
        super().load_state_dict({"state": state, "param_groups": groups})

    def _steps(self, batch: Batch, bias_correction: bool, found_inf: Tensor | None) -> list[Tensor]:
        """The counts for an op to count up; without a correction, others, at which there is none any more."""
        if bias_correction:
            return batch.steps
        for step in batch.steps:
            step += 1 if found_inf is None else (found_inf <= 0).to(step.dtype)
        return [torch.full_like(step, _NO_CORRECTION) for step in batch.steps]


class FusedAdam(_ApexOptimizer):
    """apex's `FusedAdam`: `torch.optim.AdamW`, or `torch.optim.Adam` with `adam_w_mode=False`.

    Args:
        params, lr, betas, eps, weight_decay: as of `evakernels.optim.AdamW`; a group may set them for itself.
        bias_correction: whether moments are divided by `1 - beta ** step`; a group may set it, too.
        adam_w_mode: decoupled weight decay; otherwise decay is added to the gradients.
        amsgrad: not offered, as by apex.
        set_grad_none: whether `zero_grad` sets gradients to None.
        capturable: accepted, and always so: no step waits for the device, and a CUDA graph can hold it, with the rate
            that it was captured with. apex's is a tensor on the device then; here it stays what it is.
        master_weights: steps are made on float32 copies of 16-bit parameters, which the state keeps.

    Raises:
        RuntimeError: for amsgrad.
        TypeError, ValueError: as `evakernels.optim.AdamW`.
    """

    shared_options: ClassVar[tuple[str, ...]] = (*DeviceOptimizer.shared_options, "bias_correction")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam: amsgrad is True; accepted: False")
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode
        self.set_grad_none = set_grad_none
        self.capturable = capturable
        self.master_weights = master_weights

    def step_batch(
        self, batch: Batch, options: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        weights = self._masters(batch) if self.master_weights else batch.params
        grads, decays, scale = batch.grads, batch.weight_decays, grad_scale
        if not self.adam_w_mode:
            grads, decays, scale = _with_decay(batch, weights, scale), [0.0] * len(decays), None
        steps = self._steps(batch, options.pop("bias_correction"), found_inf)
        moments = batch.exp_avgs, batch.exp_avg_sqs
        adamw_update(
            weights, grads, *moments, steps, batch.lrs, decays, grad_scale=scale, found_inf=found_inf, **options
        )
        if self.master_weights:
            torch._foreach_copy_(batch.params, weights)

    def _masters(self, batch: Batch) -> list[Tensor]:
        masters = []
        for owner, param in zip(batch.owners, batch.params, strict=True):
            state = self.state[owner]
            if owner.dtype.itemsize == 2 and "master_param" not in state:
                state["master_param"] = owner.detach().float()
            masters.append(local(state["master_param"]) if "master_param" in state else param)
        return masters


class FusedLAMB(_ApexOptimizer):
    """apex's `FusedLAMB` (You et al. 2020), which clips the gradients' norm over all groups by itself.

    Moments are float32 for 16-bit parameters too, which may be bfloat16, and gradients stay as they are, where apex
    writes into them.

    Args:
        params, lr, betas, eps, weight_decay: as of `evakernels.optim.Lamb`; a group may set them for itself.
        bias_correction, grad_averaging: whether moments are divided by `1 - beta ** step`, and whether a gradient
            enters the first one times `1 - beta1`; a group may set both.
        amsgrad, adam_w_mode, set_grad_none: as of `FusedAdam`.
        max_grad_norm: bound on the norm of all gradients together; 0, None or infinity for none.
        use_nvlamb: whether tensors without weight decay have a trust ratio as well.

    Raises:
        RuntimeError: for amsgrad.
        TypeError, ValueError: as `evakernels.optim.Lamb`.
    """

    shared_options: ClassVar[tuple[str, ...]] = (*DeviceOptimizer.shared_options, "bias_correction", "grad_averaging")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        set_grad_none: bool = True,
        max_grad_norm: float | None = 1.0,
        use_nvlamb: bool = False,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedLAMB: amsgrad is True; accepted: False")
        defaults: dict[str, Any] = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "grad_averaging": grad_averaging, "max_grad_norm": max_grad_norm}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode
        self.set_grad_none = set_grad_none
        self.use_nvlamb = use_nvlamb
        self._norm: Tensor | None = None

    def _batches(self) -> dict[tuple[Any, ...], Batch]:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        bound = self.defaults["max_grad_norm"] or math.inf
        self._norm = gradient_norm(grads) / bound if grads and bound < math.inf else None
        return super()._batches()

    def step_batch(
        self, batch: Batch, options: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        if self._norm is not None:
            # The norm is that of gradients which grad_scale has yet to divide.
            scale = 1.0 if grad_scale is None else grad_scale
            grad_scale = torch.maximum(self._norm, torch.ones_like(self._norm) * scale)
        bias_correction, averaging = options.pop("bias_correction"), options.pop("grad_averaging")
        steps = self._steps(batch, bias_correction, found_inf)
        batch = replace(batch, steps=steps)
        if averaging and self.adam_w_mode and not self.use_nvlamb:
            make_step(batch, grad_scale=grad_scale, found_inf=found_inf, variant="nvlamb", **options)
            return
        self._step_in_torch(batch, options, averaging, grad_scale, found_inf)

    def _step_in_torch(
        self,
        batch: Batch,
        options: dict[str, Any],
        averaging: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """The forms that the op hasn't: decay in the gradient, a sum in the place of an average, a ratio for all."""
        (beta1, beta2), eps = options["betas"], options["eps"]
        grads = batch.grads
        if not self.adam_w_mode:
            grads, grad_scale = _with_decay(batch, batch.params, grad_scale), None
        for i, (w, m, v, t) in enumerate(zip(batch.params, *batch.state, strict=True)):
            decay = batch.weight_decays[i]
            average, average_sq = changed_moments(grads[i].to(accumulation_dtype(w)), m, v, beta1, beta2, grad_scale)
            if not averaging:
                kept = beta1 * m.to(average.dtype)
                average = kept + (average - kept) / (1 - beta1)
            for target, value in ((m, average), (v, average_sq), (t, t + 1)):
                write(target, value, found_inf)
            weight = w.to(average.dtype)
            direction = average / bias(beta1, t, weight) / ((average_sq / bias(beta2, t, weight)).sqrt() + eps)
            if self.adam_w_mode:
                direction += decay * weight
            if decay != 0 or self.use_nvlamb:
                squares = torch.stack((weight.square().sum(), direction.square().sum()))
                sum_over(squares, batch.shards)
                norm, step_norm = squares.sqrt()
                direction *= torch.where((norm > 0) & (step_norm > 0), norm / step_norm, 1.0)
            write(w, weight - batch.lrs[i] * direction, found_inf)


def _with_decay(batch: Batch, weights: list[Tensor], grad_scale: Tensor | None) -> list[Tensor]:
    """The gradients, divided by the scale, plus weight decay: L2 regularisation."""
    grads = [g.to(accumulation_dtype(w)) for g, w in zip(batch.grads, weights, strict=True)]
    if grad_scale is not None:
        grads = [g / grad_scale for g in grads]
    return [g + decay * w for g, w, decay in zip(grads, weights, batch.weight_decays, strict=True)]
