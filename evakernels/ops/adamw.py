"""AdamW in one call for all tensors of a model, whatever their groups."""

from collections.abc import Sequence

from torch import Tensor

from ..reference import adamw as reference
from . import _tensor_lists
from ._op import define
from ._tensor_lists import Tensors


def adamw_update(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    lrs: Sequence[float] | Tensor,
    weight_decays: Sequence[float],
    *,
    betas: tuple[float, float],
    eps: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seeds: Sequence[int] = (),
    first_elements: Sequence[int] = (),
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019), in place, like `torch.optim.AdamW`.

    Parameters, moments and steps are written.

    Args:
        params, grads: n dense tensors of any shapes; float64, float32, bfloat16 or float16, also mixed.
        exp_avgs, exp_avg_sqs: the moments, in the shapes of `params` and any of these dtypes.
        steps: n different 0-D float32 tensors, the number of steps made, which is incremented.
        lrs: n learning rates; or `[n]` on the device of `params`, float32 or float64, which only the device reads: a
            captured CUDA graph then follows a schedule.
        weight_decays: n numbers; a step subtracts `lr * weight_decay` times the parameter.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        grad_scale: one element, divisor of the gradients; `grads` don't change.
        found_inf: one element; nothing is written if it is above 0. Both flags are read on the device.
        seeds: empty, or n numbers from 0 to below 2^63. With seeds the parameters, which must be bfloat16, are rounded
            stochastically: up with the probability of the fraction that is cut off, by a hash of (seed, step, element),
            equal on every backend and for any number of threads.
        first_elements: with seeds, the index of each parameter's first element in the whole tensor; 0 by default.

    Raises:
        TypeError: for a dtype or layout that isn't accepted.
        ValueError: for lists, shapes or devices that don't fit together.

    Examples:
        >>> params, grads, exp_avgs, exp_avg_sqs = ([torch.full((3,), value)] for value in (1.0, 2.0, 0.0, 0.0))
        >>> state = exp_avgs, exp_avg_sqs, [torch.zeros(())]
        >>> evakernels.adamw_update(params, grads, *state, [0.1], [0.0], betas=(0.9, 0.999), eps=1e-8)
        >>> params
        [tensor([0.9000, 0.9000, 0.9000])]
    """
    op = "adamw_update"
    _tensor_lists.tensors(op, params, steps, betas, eps, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    _tensor_lists.numbers(op, params, weight_decays=weight_decays)
    lrs, device_lrs = _tensor_lists.rates(op, params, lrs)
    _tensor_lists.flags(op, params[0], grad_scale=grad_scale, found_inf=found_inf)
    rounding = _tensor_lists.rounding(op, params, seeds, first_elements)
    state, rates = (exp_avgs, exp_avg_sqs, steps), (lrs, weight_decays)
    _update(params, grads, *state, *rates, (*betas, eps), grad_scale, found_inf, *rounding, device_lrs)


_update = define(reference.adamw_update, mutates=("params", "exp_avgs", "exp_avg_sqs", "steps"))
