"""InfoNCE and SigLIP over the global batch, without a matrix of logits unless it is small."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import _logit_gradients, _logit_tiles, backends
from .._native import Launcher
from ..distributed import Group, gather_rows, logsumexp_of_ranks, rank_and_size, resolved, sum_of_ranks
from ..reference import accumulation_dtype
from ..reference import contrastive as reference
from . import _check
from ._op import define, define_kernel, differentiable

MEMORY_BUDGET = 1 << 28
"""256 MiB: the float32 logits of 8,192 pairs, or of 2,896 on each of 8 ranks."""


def contrastive_statistics(
    image: Tensor, text: Tensor, logit_scale: Tensor, offset: int = 0, *, memory_budget: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the logits `logit_scale * image @ text^T` for losses and in-batch accuracies, in O(m + B) memory.

    Args:
        image: `[m, D]`, float64, float32, bfloat16 or float16; normalised or not.
        text: `[B, D]`, in the dtype of `image`.
        logit_scale: `[]` or `[1]`, already exponentiated.
        offset: row `offset + i` of `text` belongs to row i of `image`.
        memory_budget: as for `clip_loss`.

    Returns:
        `(row_lse [m], col_lse [B], positive [m], row_max [m], col_max [B])`: the log-sum-exp over the texts
        of each image and over the images of each text, the logit of each pair, and the largest logit of each
        image and text. All are float32 (float64 for float64 input), also under autocast; the first three have
        gradients. `positive >= row_max` is true for images with their text at the first place.

    Raises:
        TypeError: for a dtype that isn't accepted.
        ValueError: for shapes, devices or an offset that don't fit together.

    Examples:
        >>> image, text = torch.eye(3), torch.eye(3)[[0, 2, 1]]
        >>> _, _, positive, row_max, _ = evakernels.contrastive_statistics(image, text, torch.tensor(100.0))
        >>> (positive >= row_max).tolist()  # which images have their own text on top
        [True, False, False]
    """
    op = "contrastive_statistics"
    _check_features(op, image, text, ("image", "text"))
    logit_scale = _check_scalar(op, "logit_scale", logit_scale, image)
    _check.integer(op, "offset", offset, "0 to B - m")
    spare = text.shape[0] - image.shape[0]
    if spare < 0:
        raise ValueError(f"{op}: text must have m = {image.shape[0]} rows or more, got {text.shape[0]}")
    if not 0 <= offset <= spare:
        raise ValueError(f"{op}: offset must be 0 to B - m = {spare}, got {offset}")
    return _statistics((image, text, logit_scale), offset, memory_budget)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    label_smoothing: float = 0.0,
    group: Group = None,
    counts: Sequence[int] | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """Symmetric InfoNCE (Radford et al. 2021): the mean of two cross-entropies, over texts and over images.

    Args:
        image_features, text_features: `[b, D]`, one pair a row; float64, float32, bfloat16 or float16; normalised or
            not.
        logit_scale: `[]` or `[1]`, already exponentiated.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        group: the ranks of the global batch, with any `b` each, also 0. None for all ranks, **which must all call the
            loss**. False for this rank alone, as is None before `init_process_group`. The text features are gathered
            once, and each rank computes the logits of its images.
        counts: the `b` of every rank of the group. By default the ranks exchange them, and the host waits.
        memory_budget: bytes for the float32 `[b, B]` logits of this rank, saved for backward if they fit: three matmuls
            in all. Otherwise backward recomputes the logits in chunks: four matmuls.

    Returns:
        0-D, float32 (float64 for float64 input), also under autocast. Over several ranks it is the loss of the global
        batch on every rank, and the gradient is world_size times this rank's contribution. The mean over ranks, as
        data-parallel training takes it, is the gradient on the global batch for every parameter and logit_scale.

    Raises:
        TypeError: for a dtype that isn't accepted.
        ValueError: for shapes or devices that don't fit together, an empty batch, a D that differs between ranks, text
            features that require a gradient on some ranks only (neither is noticed with `counts`), counts that
            contradict this rank or group, a label_smoothing outside [0, 1], a negative memory_budget, or a group
            without this rank.
        RuntimeError: over several ranks, under forward-mode differentiation and functorch's transforms.

    Examples:
        >>> features = torch.nn.functional.normalize(torch.eye(4))
        >>> evakernels.clip_loss(features, features, torch.tensor(100.0))
        tensor(0.)
    """
    op = "clip_loss"
    group = resolved(op, group)
    _check_batch(op, image_features, text_features, group)
    logit_scale = _check_scalar(op, "logit_scale", logit_scale, image_features)
    _check.number(op, "label_smoothing", label_smoothing, "0 to 1")
    _check.number(op, "memory_budget", memory_budget, "a number of bytes, at least 0")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be 0 to 1, got {label_smoothing}")
    if memory_budget < 0:
        raise ValueError(f"{op}: memory_budget must be at least 0, got {memory_budget}")
    text, offset = gather_rows(op, "text_features", text_features, group, counts)
    inputs = image_features, text, logit_scale
    if len(image_features):
        row_lse, col_lse, target, *_ = _statistics(inputs, offset, memory_budget)
    else:  # the columns have no logit
        zero = _connected_zero(*inputs)
        row_lse = target = zero.expand(0)
        col_lse = (zero - math.inf).expand(len(text))
    if label_smoothing > 0 and len(row_lse):
        dtype = row_lse.dtype
        logit_sum = logit_scale.to(dtype) * (image_features.sum(0, dtype=dtype) * text.sum(0, dtype=dtype)).sum()
        mean_logit = logit_sum / (len(row_lse) * len(col_lse))
        target = (1 - label_smoothing) * target + label_smoothing * mean_logit
    if rank_and_size(op, group)[1] == 1:
        # The differences are small and the terms are not: summing the terms first would lose digits.
        return (torch.stack((row_lse, col_lse)) - target).mean()
    loss: Tensor = _GlobalLoss.apply(row_lse, col_lse, target, group)  # type: ignore[no-untyped-call]
    return loss


def _statistics(
    inputs: tuple[Tensor, Tensor, Tensor], offset: int, memory_budget: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    image, text, _ = inputs
    fits = len(image) * len(text) * accumulation_dtype(text).itemsize <= memory_budget
    statistics: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _forward(*inputs, offset, fits and _is_recorded(inputs))
    return statistics


def _connected_zero(*inputs: Tensor) -> Tensor:
    """0 with a graph to all inputs, as the backward pass of gathered rows is a collective of all ranks."""
    dtype = accumulation_dtype(inputs[0])  # as the loss of other ranks, with which it is summed
    return torch.stack([x.reshape(-1)[:0].sum(dtype=dtype) for x in inputs]).sum()


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: Group = None,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """The sigmoid loss (SigLIP, Zhai et al. 2023): a binary classification of every image-text combination.

    Arguments, result and errors are as for `clip_loss`; `logit_bias`, `[]` or `[1]`, is added to every logit. The sum
    over all combinations is divided by the global batch size.

    Examples:
        >>> features = torch.eye(2)
        >>> loss = evakernels.siglip_loss(features, features, torch.tensor(10.0), torch.tensor(-5.0))
        >>> round(loss.item(), 4)
        0.0134
    """
    op = "siglip_loss"
    group = resolved(op, group)
    _check_batch(op, image_features, text_features, group)
    logit_scale = _check_scalar(op, "logit_scale", logit_scale, image_features)
    logit_bias = _check_scalar(op, "logit_bias", logit_bias, image_features)
    text, offset = gather_rows(op, "text_features", text_features, group, counts)
    return sum_of_ranks(siglip_sum(image_features, text, logit_scale, logit_bias, offset), group) / len(text)


def siglip_sum(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int) -> Tensor:
    """The sum of the sigmoid loss over these images and all texts, unchecked; row i belongs to text offset + i."""
    inputs = image, text, _zero_dim(logit_scale), _zero_dim(logit_bias)
    if len(image) == 0:
        return _connected_zero(*inputs)
    records = torch.is_grad_enabled()
    loss: Tensor = _siglip_forward(*inputs, offset, [records and x.requires_grad for x in inputs])
    return loss


def _is_recorded(inputs: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


class _GlobalLoss(torch.autograd.Function):
    """InfoNCE from the statistics of every rank's rows."""

    @staticmethod
    def forward(ctx: Any, row_lse: Tensor, col_lse: Tensor, target: Tensor, group: ProcessGroup | None) -> Tensor:
        row_sum = (row_lse.double() - 2 * target.double()).sum()
        global_col_lse, row_sum = logsumexp_of_ranks(col_lse, row_sum, group)
        ctx.save_for_backward((col_lse - global_col_lse).exp_().to(col_lse.dtype))
        ctx.rows, ctx.factor = len(target), dist.get_world_size(group) / (2 * len(col_lse))
        return ((row_sum + global_col_lse.sum()) / (2 * len(col_lse))).to(col_lse.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (share,) = ctx.saved_tensors
        each = ctx.factor * gradient
        row_gradient = each.expand(ctx.rows)
        return row_gradient, each * share, -2 * row_gradient, None


def _check_batch(op: str, image: Tensor, text: Tensor, group: ProcessGroup | None) -> None:
    # A rank without a batch mustn't raise alone: the others would wait for it.
    _check_features(op, image, text, ("image_features", "text_features"), may_be_empty=rank_and_size(op, group)[1] > 1)
    _check.shape(op, "text_features", text, tuple(image.shape), "image_features.shape")


def _check_features(
    op: str, image: Tensor, text: Tensor, names: tuple[str, str], *, may_be_empty: bool = False
) -> None:
    features = dict(zip(names, (image, text), strict=True))
    _check.floating(op, **features)
    _check.same_device(op, **features)
    if image.dtype != text.dtype:
        raise TypeError(f"{op}: {names[1]} must be {image.dtype} (as {names[0]}), got {text.dtype}")
    for name, tensor in features.items():
        if tensor.dim() != 2 or (tensor.shape[0] == 0 and not may_be_empty):
            raise ValueError(f"{op}: {name} must have shape [b, D] with b > 0, got {tuple(tensor.shape)}")
    _check.shape(op, names[1], text, (text.shape[0], image.shape[1]), f"[b, D of {names[0]}]")


def _check_scalar(op: str, name: str, scalar: Tensor, like: Tensor) -> Tensor:
    _check.floating(op, **{name: scalar})
    if scalar.numel() != 1:
        raise ValueError(f"{op}: {name} must have one element, got shape {tuple(scalar.shape)}")
    _check.same_device(op, features=like, **{name: scalar})
    return _zero_dim(scalar)


def _zero_dim(scalar: Tensor) -> Tensor:
    return scalar if scalar.dim() == 0 else scalar.reshape(())  # a view takes time, in backward too


# --- ops ------------------------------------------------------------------------------------------------------------


def _forward_fake(image: Tensor, text: Tensor, logit_scale: Tensor, offset: int, keep: bool) -> Any:
    rows, columns = image.shape[0], text.shape[0]
    sizes = (rows,), (columns,), (rows,), (rows,), (columns,), (rows, columns) if keep else (0,)
    return tuple(image.new_empty(size, dtype=accumulation_dtype(image)) for size in sizes)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, logit_scale, ctx.offset, keep = inputs
    row_lse, col_lse, _, row_max, col_max, logits = output
    ctx.mark_non_differentiable(row_max, col_max)
    ctx.save_for_backward(image, text, logit_scale, row_lse, col_lse, logits if keep else None)


def _gradient(ctx: Any, drow_lse: Tensor, dcol_lse: Tensor, dpositive: Tensor, *_: Tensor) -> Any:
    needs_image, needs_text, *_ = ctx.needs_input_grad
    return _backward(drow_lse, dcol_lse, dpositive, *ctx.saved_tensors, ctx.offset, (needs_image, needs_text))


def _backward_fake(*args: Any) -> Any:
    _, _, _, image, text, logit_scale, *_, needs_grad = args
    return _empty_gradients(image, text, logit_scale, needs_grad)


def _empty_gradients(
    image: Tensor, text: Tensor, logit_scale: Tensor, needs_grad: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dimage, dtext = (
        x.new_empty(x.shape if needed else (0,)) for x, needed in zip((image, text), needs_grad, strict=True)
    )
    return dimage, dtext, torch.empty_like(logit_scale)


def _siglip_fake(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, needs_grad: Sequence[bool]
) -> Any:
    loss = image.new_empty((), dtype=accumulation_dtype(image))
    gradients = _empty_gradients(image, text, logit_scale, needs_grad[:2])
    return loss, *(loss.new_empty(x.shape) for x in (*gradients, logit_bias))


def _siglip_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _ = inputs
    _, *gradients = output
    ctx.save_for_backward(*tensors, *gradients)


def _siglip_gradient(ctx: Any, dloss: Tensor) -> Any:
    saved = ctx.saved_tensors
    needed = zip(saved[:4], saved[4:], ctx.needs_input_grad, strict=False)
    return tuple((dloss * gradient).to(x.dtype) if needs else None for x, gradient, needs in needed)


def _gpu_reasons(*, image: Tensor | None = None, logits: Tensor | None = None, **_: Any) -> list[str]:
    """Why the compiled GPU kernels don't support these features, or logits that forward saved."""
    reasons = []
    if image is not None and image.dtype == torch.float32:
        reasons.append("float32; the compiled GPU kernels support float16 and bfloat16, Triton's float32 too")
    if logits is not None:
        reasons.append("saved logits; only Triton's kernel reads them")
    return reasons


_FEATURES = "Tensor image, Tensor text, Tensor logit_scale"
_UPSTREAM = "Tensor drow_lse, Tensor dcol_lse, Tensor dpositive"
_LSE = "Tensor row_lse, Tensor col_lse"
define_kernel(f"contrastive_dlogits({_UPSTREAM}, {_FEATURES}, {_LSE}, int offset) -> Tensor")
define_kernel(f"siglip_dlogits({_FEATURES}, Tensor logit_bias, int offset, bool[] needs_grad) -> (Tensor, Tensor)")
_TILE = "Tensor(a!) values"
define_kernel(
    f"contrastive_tile_statistics({_TILE}, Tensor logit_scale, int pair, Tensor(b!) col_lse, Tensor(c!) col_max, "
    "bool is_last) -> (Tensor, Tensor, Tensor)"
)
define_kernel(
    f"contrastive_tile_gradients({_TILE}, bool are_logits, Tensor logit_scale, int first_row, int offset, "
    f"{_UPSTREAM}, {_LSE}) -> Tensor"
)
define_kernel(
    f"siglip_tile({_TILE}, Tensor logit_scale, Tensor logit_bias, int pair, bool needs_grad)"
    " -> (Tensor, Tensor, Tensor)"
)

_forward = define(
    reference.contrastive_forward,
    fake=_forward_fake,
    decomposition=lambda image, text, scale, offset, _: reference.contrastive_forward(
        image, text, scale, offset, False
    ),
    gpu_reasons=_gpu_reasons,
    cpu_launcher=Launcher(_logit_tiles.contrastive_forward, "contrastive_tile_statistics"),
)
_backward = define(
    reference.contrastive_backward,
    fake=_backward_fake,
    gpu_reasons=_gpu_reasons,
    cpu_launcher=Launcher(_logit_tiles.contrastive_backward, "contrastive_tile_gradients"),
    gpu_launcher=Launcher(_logit_gradients.contrastive_backward, "contrastive_dlogits"),
)
differentiable(_forward, _backward, setup_context=_setup, formula=_gradient, returned=5)

_siglip_forward = define(
    reference.siglip_forward,
    fake=_siglip_fake,
    decomposition=lambda image, text, scale, bias, offset, _: reference.siglip_forward(
        image, text, scale, bias, offset, [False] * 4
    ),
    gpu_reasons=_gpu_reasons,
    cpu_launcher=Launcher(_logit_tiles.siglip_forward, "siglip_tile"),
    gpu_launcher=Launcher(_logit_gradients.siglip_forward, "siglip_dlogits"),
)
differentiable(_siglip_forward, None, setup_context=_siglip_setup, formula=_siglip_gradient, returned=1)

backends.name_ops("contrastive_statistics", "contrastive_forward")
backends.name_ops("clip_loss", "contrastive_forward")
backends.name_ops("siglip_loss", "siglip_forward")
