"""LAMB for all tensors of a model, in two phases; norms of shards are reduced between them."""

from collections.abc import Sequence

from torch import Tensor

from .. import backends, names
from ..reference import accumulation_dtype
from ..reference import lamb as reference
from . import _check, _tensor_lists
from ._op import define
from ._tensor_lists import Tensors

VARIANTS = ("nvlamb", "deepspeed")


def lamb_step(
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
    variant: str = "nvlamb",
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seeds: Sequence[int] = (),
    first_elements: Sequence[int] = (),
) -> None:
    """Calls `lamb_update`, then `lamb_apply`, on tensors that aren't sharded; arguments and errors as there.

    Examples:
        >>> params, grads, exp_avgs, exp_avg_sqs = ([torch.full((3,), value)] for value in (1.0, 2.0, 0.0, 0.0))
        >>> state = exp_avgs, exp_avg_sqs, [torch.zeros(())]
        >>> options = {"betas": (0.9, 0.999), "eps": 1e-8}
        >>> evakernels.lamb_step(params, grads, *state, [0.1], [0.01], **options)
        >>> params
        [tensor([0.9000, 0.9000, 0.9000])]
    """
    op = "lamb_step"
    check_variant(op, variant)
    _tensor_lists.tensors(op, params, steps, betas, eps, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    _tensor_lists.numbers(op, params, weight_decays=weight_decays)
    lrs, device_lrs = _tensor_lists.rates(op, params, lrs)
    _tensor_lists.flags(op, params[0], grad_scale=grad_scale, found_inf=found_inf)
    rounding = _tensor_lists.rounding(op, params, seeds, first_elements)
    state, options = (exp_avgs, exp_avg_sqs, steps), ((*betas, eps), variant == "nvlamb")
    squared_norms = _update(params, grads, *state, weight_decays, *options, grad_scale, found_inf)
    _apply(params, *state, squared_norms, lrs, weight_decays, *options, found_inf, *rounding, device_lrs)


def lamb_update(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    weight_decays: Sequence[float],
    *,
    betas: tuple[float, float],
    eps: float,
    variant: str = "nvlamb",
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """The first phase of LAMB (You et al. 2020): updates moments and steps in place and returns norms.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, steps, betas, eps, grad_scale, found_inf: as for `adamw_update`;
            `params` aren't written.
        weight_decays: n numbers.
        variant: `"nvlamb"`, the form of the paper and of apex: corrected moments; the trust ratio isn't clipped and
            applies to tensors with weight decay only. `"deepspeed"`: bias correction multiplies the whole step; the
            trust ratio is clipped to [0.01, 10] and applies to every tensor.

    Returns:
        `[n, 2]` squared norms of each parameter and of its direction, for `lamb_apply`, float32 (float64 if a parameter
        is float64). Sum them over the ranks if tensors are sharded.

    Raises:
        TypeError: for a dtype or layout that isn't accepted.
        ValueError: for lists, shapes or devices that don't fit together, or an unknown variant.

    Examples:
        >>> params, grads, exp_avgs, exp_avg_sqs = ([torch.full((3,), value)] for value in (1.0, 2.0, 0.0, 0.0))
        >>> state = exp_avgs, exp_avg_sqs, [torch.zeros(())]
        >>> options = {"betas": (0.9, 0.999), "eps": 1e-8}
        >>> squared_norms = evakernels.lamb_update(params, grads, *state, [0.01], **options)
        >>> evakernels.lamb_apply(params, *state, squared_norms, [0.1], [0.01], **options)
        >>> params
        [tensor([0.9000, 0.9000, 0.9000])]
    """
    op = "lamb_update"
    check_variant(op, variant)
    _tensor_lists.tensors(op, params, steps, betas, eps, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    _tensor_lists.numbers(op, params, weight_decays=weight_decays)
    _tensor_lists.flags(op, params[0], grad_scale=grad_scale, found_inf=found_inf)
    state, options = (exp_avgs, exp_avg_sqs, steps), ((*betas, eps), variant == "nvlamb")
    squared_norms: Tensor = _update(params, grads, *state, weight_decays, *options, grad_scale, found_inf)
    return squared_norms


def lamb_apply(
    params: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    squared_norms: Tensor,
    lrs: Sequence[float] | Tensor,
    weight_decays: Sequence[float],
    *,
    betas: tuple[float, float],
    eps: float,
    variant: str = "nvlamb",
    found_inf: Tensor | None = None,
    seeds: Sequence[int] = (),
    first_elements: Sequence[int] = (),
) -> None:
    """The second phase of LAMB: writes `params`, from the state after `lamb_update` and the norms that it returned.

    Args:
        squared_norms: `[n, 2]`, as `lamb_update` returns them.
        lrs, seeds, first_elements: as for `adamw_update`; other arguments and errors as for `lamb_update`.

    Examples:
        >>> params, moments, steps = [torch.ones(3)], [[torch.zeros(3)], [torch.zeros(3)]], [torch.zeros(())]
        >>> decays, options = [0.0], {"betas": (0.9, 0.999), "eps": 1e-8}
        >>> norms = evakernels.lamb_update(params, [torch.ones(3)], *moments, steps, decays, **options)
        >>> evakernels.lamb_apply(params, *moments, steps, norms, [0.1], decays, **options)
        >>> bool((params[0] < 1).all())
        True
    """
    op = "lamb_apply"
    check_variant(op, variant)
    _tensor_lists.tensors(op, params, steps, betas, eps, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    _tensor_lists.numbers(op, params, weight_decays=weight_decays)
    lrs, device_lrs = _tensor_lists.rates(op, params, lrs)
    _check.floating(op, squared_norms=squared_norms)
    _check.same_device(op, **{"params[0]": params[0]}, squared_norms=squared_norms)
    _check.shape(op, "squared_norms", squared_norms, (len(params), 2), "[n, 2]")
    _tensor_lists.flags(op, params[0], found_inf=found_inf)
    rounding = _tensor_lists.rounding(op, params, seeds, first_elements)
    state, options = (exp_avgs, exp_avg_sqs, steps), ((*betas, eps), variant == "nvlamb")
    _apply(params, *state, squared_norms, lrs, weight_decays, *options, found_inf, *rounding, device_lrs)


def check_variant(op: str, variant: str) -> None:
    """Raises `ValueError` unless `variant` is one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(names.unknown(f"{op}: variant", variant, VARIANTS))


# --- ops ------------------------------------------------------------------------------------------------------------


_update = define(
    reference.lamb_update,
    fake=lambda params, *rest: params[0].new_empty(len(params), 2, dtype=accumulation_dtype(*params)),
    mutates=("exp_avgs", "exp_avg_sqs", "steps"),
)
_apply = define(reference.lamb_apply, mutates=("params",))
backends.name_ops("lamb_step", "lamb_update", "lamb_apply")
