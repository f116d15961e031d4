"""Gradients of contrastive losses on GPUs.

A kernel of CUDA or Triton writes the gradients of the logits, a chunk of rows at a time, in the features' dtype; torch
multiplies them with the features into float32. Each function takes the kernel and its reference's arguments. `unit`, a
power of two, scales logit gradients into float16's range. Features are padded with zeros to a `multiple` of channels.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import contrastive as reference

CHUNK = 1 << 28, 2048
"""Maximum bytes and minimum rows of a chunk: with fewer, traffic of the text gradient would limit the matmuls."""

SIGLIP_UNIT = 16384.0
"""The `unit` of the sigmoid loss in Triton and, as `kSiglipUnit`, in CUDA: gradients of its logits are at most 1."""

Kernel = Callable[..., Tensor]
SiglipKernel = Callable[..., tuple[Tensor, Tensor]]


def contrastive_backward(
    kernel: Kernel,
    drow_lse: Tensor,
    dcol_lse: Tensor,
    dpositive: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    offset: int,
    needs_grad: Sequence[bool],
    *,
    logits: Tensor | None = None,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and logit_scale.

    `kernel` maps a chunk of the arguments, and its logits if forward saved them, to logit gradients.
    """
    peak = torch.cat((drow_lse, dcol_lse, dpositive)).abs().amax()
    # The largest gradient becomes less than 2^14.
    exponent = 14 - torch.frexp(peak).exponent
    unit = torch.ldexp(torch.ones_like(peak), exponent.clamp(-100, 100))
    drow_lse, dcol_lse, dpositive = (gradient * unit for gradient in (drow_lse, dcol_lse, dpositive))

    def chunk_gradients(rows: slice, image: Tensor, text: Tensor) -> Tensor:
        saved = () if logits is None else (logits[rows],)
        upstream = drow_lse[rows], dcol_lse, dpositive[rows]
        return kernel(*upstream, image, text, logit_scale, row_lse[rows], col_lse, offset + rows.start, *saved)

    features = image, text, logit_scale
    dimage, dtext, dscale = _feature_gradients(chunk_gradients, *features, unit, image.dtype, needs_grad, multiple)
    return dimage, dtext, dscale.to(logit_scale.dtype)


def siglip_value(
    kernel: SiglipKernel,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    multiple: int = 1,
) -> Tensor:
    """The summed loss. `kernel` is as for `siglip_forward`, but its sums may lack the bias gradient."""
    image, text = padded(image, multiple), padded(text, multiple)
    sums, _ = kernel(image, text, logit_scale, logit_bias, offset, [False])
    return _totals(sums)[0]


def siglip_forward(
    kernel: SiglipKernel,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    needs_grad: Sequence[bool],
    *,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The summed loss and its gradients.

    `kernel` returns `(sums, dlogits)`; `sums` is `[2, n]`, partial sums of the loss and of the bias gradient. Its last
    argument is whether it computes gradients.
    """
    unit = image.new_full((), SIGLIP_UNIT, dtype=torch.float32)
    parts = []

    def chunk_gradients(rows: slice, image: Tensor, text: Tensor) -> Tensor:
        sums, dlogits = kernel(image, text, logit_scale, logit_bias, offset + rows.start, [True])
        parts.append(sums)
        return dlogits

    features = image, text, logit_scale
    gradients = _feature_gradients(chunk_gradients, *features, unit, torch.float32, needs_grad, multiple)
    loss, dbias = _totals(torch.cat(parts, 1))
    return loss, *gradients, dbias


def siglip_backward(kernel: SiglipKernel, *args: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales the gradients that `siglip_forward` saved; needs no kernel."""
    return reference.siglip_backward(*args)


def rows_of_chunk(row_bytes: int) -> int:
    """The rows of a chunk, of at most the maximum bytes if the minimum rows fit."""
    most_bytes, least_rows = CHUNK
    return max(1, most_bytes // (row_bytes * least_rows)) * least_rows


def row_chunks(features: Tensor, row_bytes: int) -> Iterator[slice]:
    height = rows_of_chunk(row_bytes)
    for start in range(0, len(features), height):
        yield slice(start, min(start + height, len(features)))


def padded(features: Tensor, multiple: int) -> Tensor:
    """Dense features, padded with zeros to a multiple of channels."""
    missing = -features.shape[1] % multiple
    return (F.pad(features, (0, missing)) if missing else features).contiguous()


def _feature_gradients(
    chunk_gradients: Callable[[slice, Tensor, Tensor], Tensor],
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    unit: Tensor,
    dtype: torch.dtype,
    needs_grad: Sequence[bool],
    multiple: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of image and text in `dtype`, empty unless needed, and the scale's in float32.

    `chunk_gradients` maps rows, their images and all texts to the gradients of their logits times `unit`.
    """
    needs_image, needs_text = needs_grad
    depth = image.shape[1]
    image, text = padded(image, multiple), padded(text, multiple)
    factor = logit_scale.float() / unit
    dimage = image.new_empty((len(image), depth) if needs_image else (0,), dtype=dtype)
    dtext = text.new_zeros(text.shape if needs_text else (0,), dtype=torch.float32)
    dscale = torch.zeros_like(unit)
    for rows in row_chunks(image, len(text) * image.itemsize):
        image_rows = image[rows]
        dlogits = chunk_gradients(rows, image_rows, text)[:, : len(text)]
        if needs_text:
            _add_product(dtext, dlogits.T, image_rows)
        if needs_image or not needs_text:
            product = _product(dlogits, text)
            dscale += (product * image_rows).sum()
        if needs_image:
            torch.mul(product[:, :depth], factor, out=dimage[rows])
    if needs_text:
        if not needs_image:
            dscale = (dtext * text).sum()
        dtext = dtext[:, :depth]
    return dimage, (dtext * factor).to(dtype), dscale / unit


def _totals(parts: Tensor) -> Tensor:
    return parts.sum(1, dtype=torch.float64).float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matmul with a float32 result, which a CPU (interpreted kernels) can't make of 16-bit inputs."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _add_product(acc: Tensor, a: Tensor, b: Tensor) -> None:
    if a.is_cuda:
        torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)
    else:
        acc.addmm_(a.float(), b.float())
