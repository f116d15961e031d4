"""NVIDIA apex's fused norms and optimizers on evakernels' ops; apex isn't needed.

    from .apex import FusedAdam, FusedLAMB, FusedLayerNorm, MixedFusedRMSNorm

replaces the imports from `apex.normalization` and `apex.optimizers`. Signatures and state dicts are apex's.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ..autocast import is_on
from ..nn.layer_norm import over_trailing
from ..ops import adamw_update, gradient_norm, layer_norm, rms_norm
from ..ops._dtensors import local
from ..optim._device_optimizer import Batch, DeviceOptimizer
from ..optim.lamb import make_step
from . import missing

__all__ = ["FusedAdam", "FusedLAMB", "FusedLayerNorm", "FusedRMSNorm", "MixedFusedLayerNorm", "MixedFusedRMSNorm"]

__getattr__ = missing(
    __name__,
    {
        "fused_layer_norm fused_layer_norm_affine mixed_dtype_fused_layer_norm_affine": "use evakernels.layer_norm",
        "fused_rms_norm fused_rms_norm_affine mixed_dtype_fused_rms_norm_affine manual_rms_norm": "use "
        "evakernels.rms_norm",
        "FusedSGD FusedNovoGrad FusedAdagrad FusedMixedPrecisionLamb": "use FusedAdam or FusedLAMB",
    },
)


# --- norms ----------------------------------------------------------------------------------------------------------


class _Norm(nn.Module):
    """apex's arguments and dtypes, before a norm of torch in the order of bases."""

    norm: ClassVar[Callable[..., Tensor]]
    normalized_shape: tuple[int, ...]

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine)
        self.memory_efficient = memory_efficient

    def forward(self, input: Tensor) -> Tensor:
        """`[..., *normalized_shape]` to the same shape; under autocast the output has autocast's dtype."""
        device = input.device.type
        if not is_on(device):
            return self._promoted(input)
        with torch.autocast(device, enabled=False):
            return self._promoted(input.to(torch.get_autocast_dtype(device)))

    def _promoted(self, x: Tensor) -> Tensor:
        parameters = self._parameters.values()
        promoted = (None if p is None else p.to(torch.promote_types(p.dtype, x.dtype)) for p in parameters)
        return over_trailing(self, type(self).norm, x, self.normalized_shape, *promoted)


class FusedLayerNorm(_Norm, nn.LayerNorm):
    """apex's `FusedLayerNorm`: LayerNorm over the trailing dimensions, in the dtype of the input.

    Args:
        normalized_shape, eps, elementwise_affine: as for `torch.nn.LayerNorm`.
        memory_efficient: accepted without effect; only the statistics of each row are saved besides the input.

    Raises:
        ValueError: in `forward`, if the input's shape doesn't end in `normalized_shape`.
    """

    norm = staticmethod(layer_norm)


class FusedRMSNorm(_Norm, nn.RMSNorm):
    """apex's `FusedRMSNorm`: RMSNorm with a weight only. Arguments and errors as for `FusedLayerNorm`."""

    norm = staticmethod(rms_norm)


class _MixedNorm(_Norm):
    """Norm with the output in the dtype of the weight."""

    weight: nn.Parameter

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        *,
        memory_efficient: bool = False,
        elementwise_affine: bool = True,
    ) -> None:
        if not elementwise_affine:
            raise RuntimeError(f"{type(self).__name__}: elementwise_affine must be True, got False")
        super().__init__(normalized_shape, eps, True, memory_efficient)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., *normalized_shape]` to the same shape, in the dtype of the weight."""
        parameters, dtype = self._parameters.values(), self.weight.dtype
        return over_trailing(self, type(self).norm, input, self.normalized_shape, *parameters, out_dtype=dtype)


class MixedFusedLayerNorm(_MixedNorm, FusedLayerNorm):
    """apex's `MixedFusedLayerNorm`: `FusedLayerNorm` with the output in the dtype of the weight."""


class MixedFusedRMSNorm(_MixedNorm, FusedRMSNorm):
    """apex's `MixedFusedRMSNorm`: `FusedRMSNorm` with the output in the dtype of the weight."""


# --- optimizers -----------------------------------------------------------------------------------------------------

_ACCEPTED = {
    "adam_w_mode": (True, "use torch.optim.Adam for weight decay in the gradients"),
    "bias_correction": (True, "use timm.optim.Lamb(bias_correction=False), or NVIDIA's apex for Adam"),
    "grad_averaging": (True, "use timm.optim.Lamb(grad_averaging=False)"),
    "use_nvlamb": (False, "use timm.optim.Lamb(always_adapt=True)"),
}
"""The only accepted value of an option, and the replacement for others."""


class _ApexOptimizer(DeviceOptimizer):
    """Options and state dict of apex: one step count a group. Inside, every tensor has its count on the device."""

    def __init__(
        self, params: ParamsT, amsgrad: bool, set_grad_none: bool, defaults: dict[str, Any], **fixed: bool
    ) -> None:
        if amsgrad:
            raise RuntimeError(f"{type(self).__name__}: amsgrad must be False, got True")
        self.check_options(defaults | fixed)
        super().__init__(params, defaults)
        self.set_grad_none = set_grad_none

    def check_options(self, options: dict[str, Any]) -> None:
        super().check_options(options)
        for option, (accepted, replacement) in _ACCEPTED.items():
            if bool(options.get(option, accepted)) != accepted:
                message = f"{type(self).__name__}: {option} must be {accepted}, got {options[option]}"
                raise ValueError(f"{message}: {replacement}")

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Sets gradients to None, or to zero if `set_grad_none` is False."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def measured_step(self) -> dict[Tensor, Tensor]:
        """Raises `NotImplementedError`: apex has no such method."""
        raise NotImplementedError(f"{type(self).__name__} has no measured_step; evakernels.optim's optimizers have one")

    def state_dict(self) -> dict[str, Any]:
        """apex's state dict: `step` of a group is an int, the largest count of its tensors."""
        packed = super().state_dict()
        packed["state"] = {i: dict(state) for i, state in packed["state"].items()}
        for group in packed["param_groups"]:
            steps = [packed["state"][i].pop("step") for i in group["params"] if i in packed["state"]]
            group["step"] = max((int(step) for step in steps), default=0)
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of apex's class or of this one."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        state = {i: dict(param_state) for i, param_state in state_dict["state"].items()}
        for group in groups:
            step = float(group.pop("step", 0))
            for i in group["params"]:
                if i in state:
                    state[i].setdefault("step", step)
        super().load_state_dict({"state": state, "param_groups": groups})


class FusedAdam(_ApexOptimizer):
    """apex's `FusedAdam`: `torch.optim.AdamW`.

    Args:
        params, lr, betas, eps, weight_decay: as for `evakernels.optim.AdamW`, as are errors; a group may set them.
        bias_correction, adam_w_mode: must be True, otherwise `ValueError`.
        amsgrad: must be False, as in apex, otherwise `RuntimeError`.
        set_grad_none: whether `zero_grad` sets gradients to None.
        capturable: accepted without effect, as no step synchronises. A CUDA graph keeps the learning rate of its
            capture; in apex it is a tensor on the device.
        master_weights: update float32 copies of 16-bit parameters, which are part of the state.
    """

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
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay}
        super().__init__(params, amsgrad, set_grad_none, defaults, adam_w_mode=adam_w_mode)
        self.capturable, self.master_weights = capturable, master_weights

    def step_batch(
        self, batch: Batch, options: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        weights = self._masters(batch) if self.master_weights else batch.params
        options |= {"grad_scale": grad_scale, "found_inf": found_inf}
        adamw_update(weights, batch.grads, *batch.state, batch.rates, batch.weight_decays, **options)
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
    """apex's `FusedLAMB` (You et al. 2020), which clips the global gradient norm itself.

    Moments are float32 for 16-bit parameters, which may be bfloat16. Gradients stay unchanged; apex overwrites them.

    Args:
        params, lr, betas, eps, weight_decay: as for `evakernels.optim.Lamb`, as are errors; a group may set them.
        bias_correction, amsgrad, adam_w_mode, set_grad_none: as for `FusedAdam`.
        grad_averaging: must be True, otherwise `ValueError`.
        max_grad_norm: maximum global L2 norm of the gradients; 0, None or infinity disables clipping.
        use_nvlamb: must be False, otherwise `ValueError`: tensors without weight decay have no trust ratio.
    """

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
        defaults: dict[str, Any] = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "grad_averaging": grad_averaging, "max_grad_norm": max_grad_norm}
        super().__init__(params, amsgrad, set_grad_none, defaults, adam_w_mode=adam_w_mode, use_nvlamb=use_nvlamb)
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
            # The gradients of the norm aren't divided by grad_scale yet.
            scale = 1.0 if grad_scale is None else grad_scale
            grad_scale = torch.maximum(self._norm, torch.ones_like(self._norm) * scale)
        make_step(batch, grad_scale=grad_scale, found_inf=found_inf, variant="nvlamb", **options)
