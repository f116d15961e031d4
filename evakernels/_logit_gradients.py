"""Gradients of contrastive losses: a loop over chunks of rows of logits, with torch's matmuls.

`feature_gradients` is the loop of all backends; a kernel or a pass writes the gradients of a chunk of logits. The other
functions are for GPUs, where a kernel of CUDA or Triton writes them in the features' dtype; `_logit_tiles` has those
for CPUs. Each takes the kernel and its reference's arguments. A power of two scales logit gradients into float16's
range. Features are padded with zeros to a `multiple` of channels.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 28, 2048
"""Maximum bytes and minimum rows of a chunk: with fewer, traffic of the text gradient would limit the matmuls."""

SIGLIP_UNIT = 16384.0
"""Scale of the sigmoid loss's logit gradients, 1 at most, in Triton and, as `kSiglipUnit`, in CUDA."""

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
    logits: Tensor | None,
    offset: int,
    needs_grad: Sequence[bool],
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
        arguments = image, text, logit_scale, row_lse[rows], col_lse, offset + rows.start
        return kernel(*upstream, *arguments, *saved)[:, : len(text)]

    factor, height = logit_scale.float() / unit, _height(image, text)
    dimage, dtext, parts = feature_gradients(
        chunk_gradients, image, text, factor, needs_grad, image.dtype, height, multiple
    )
    dscale = torch.stack(parts).sum() / unit
    return dimage, dtext, dscale.to(logit_scale.dtype)


def siglip_forward(
    kernel: SiglipKernel,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    needs_grad: Sequence[bool],
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The summed loss and its gradients; one launch computes the loss alone.

    `kernel` returns `(sums, dlogits)`; `sums` is `[2, n]`, partial sums of the loss and of the bias gradient. Its last
    argument is whether it computes gradients; without them `sums` may be `[1, n]`.
    """
    if not any(needs_grad):
        features = padded(image, multiple), padded(text, multiple)
        sums, _ = kernel(*features, logit_scale, logit_bias, offset, [False])
        loss = _totals(sums)[0]
        return loss, loss.new_empty(0), loss.new_empty(0), loss.new_empty(()), loss.new_empty(())
    chunk_sums = []

    def chunk_gradients(rows: slice, image: Tensor, text: Tensor) -> Tensor:
        sums, dlogits = kernel(image, text, logit_scale, logit_bias, offset + rows.start, [True])
        chunk_sums.append(sums)
        return dlogits[:, : len(text)]

    factor, height = logit_scale.float() / SIGLIP_UNIT, _height(image, text)
    dimage, dtext, parts = feature_gradients(
        chunk_gradients, image, text, factor, needs_grad[:2], torch.float32, height, multiple
    )
    loss, dbias = _totals(torch.cat(chunk_sums, 1))
    dscale = torch.stack(parts).sum() / SIGLIP_UNIT
    return loss, dimage, dtext, dscale, dbias


def feature_gradients(
    chunk_gradients: Callable[[slice, Tensor, Tensor], Tensor],
    image: Tensor,
    text: Tensor,
    factor: Tensor | None,
    needs_grad: Sequence[bool],
    dtype: torch.dtype,
    height: int,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The gradients of image and text in `dtype`, empty unless needed, and the terms of the scale's gradient.

    Args:
        chunk_gradients: maps rows, their images and all texts to the gradients of their logits.
        factor: of the features' gradients. None if `chunk_gradients` returns gradients of the unscaled products and
            sums the scale's gradient itself; then all tensors are float32 and there are no numbers.
        height: rows of a chunk.
    """
    needs_image, needs_text = needs_grad
    rows, depth = image.shape
    image, text = padded(image, multiple), padded(text, multiple)
    dimage = image.new_empty((rows, depth) if needs_image else (0,), dtype=dtype)
    dtext: Tensor | None = None
    parts: list[Tensor] = []
    for chunk in row_chunks(rows, height):
        image_rows = select_rows(image, chunk)
        dlogits = chunk_gradients(chunk, image_rows, text)
        if needs_text:
            dtext = _product(dlogits.T, image_rows, dtext)
        if factor is None and needs_image:
            torch.mm(dlogits, text, out=select_rows(dimage, chunk))
        elif factor is not None and (needs_image or not needs_text):
            product = _product(dlogits, text)
            parts.append((product * image_rows).sum())
            if needs_image:
                torch.mul(product[:, :depth], factor, out=dimage[chunk])
        del dlogits  # before those of the next chunk are made
    if dtext is None:
        return dimage, text.new_empty(0, dtype=dtype), parts
    if factor is None:
        return dimage, dtext, parts
    return dimage, (dtext[:, :depth] * factor).to(dtype), parts or [(dtext * text).sum()]


def rows_of_chunk(row_bytes: int) -> int:
    """The rows of a chunk, of at most the maximum bytes if the minimum rows fit."""
    most_bytes, least_rows = CHUNK
    return max(1, most_bytes // (row_bytes * least_rows)) * least_rows


def row_chunks(rows: int, height: int) -> Iterator[slice]:
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def select_rows(matrix: Tensor, chunk: slice) -> Tensor:
    """A chunk of rows, without a view of all rows, which would take time."""
    return matrix if chunk.stop - chunk.start == matrix.shape[0] else matrix[chunk]


def padded(features: Tensor, multiple: int) -> Tensor:
    """Dense features, padded with zeros to a multiple of channels."""
    missing = -features.shape[1] % multiple
    return (F.pad(features, (0, missing)) if missing else features).contiguous()


def _height(image: Tensor, text: Tensor) -> int:
    return rows_of_chunk(len(text) * image.itemsize)


def _totals(parts: Tensor) -> Tensor:
    return parts.sum(1, dtype=torch.float64).float()


def _product(a: Tensor, b: Tensor, acc: Tensor | None = None) -> Tensor:
    """a @ b in float32, added to `acc` in place; a CPU can't multiply 16-bit inputs so (interpreted kernels)."""
    if a.is_cuda:
        if acc is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)
    a, b = a.float(), b.float()
    return torch.mm(a, b) if acc is None else acc.addmm_(a, b)
