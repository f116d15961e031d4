"""Contrastive losses over one batch of pairs: InfoNCE, and the sigmoid loss of SigLIP."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import evakernels
from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, Work, peer, register
from benchmarks.shapes import Shape

# Start values of training: CLIP's temperature, and the temperature and bias of SigLIP (Zhai et al. 2023).
CLIP_SCALE = 1 / 0.07
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0

# The largest matrices of logits exceed a GPU's memory: candidates that materialize them fail there.
_SHAPES = {
    "cpu": ("eva02-b16@224 b256", "eva02-b16@224 b1024", "eva02-b16@224 b2048"),
    "cuda": (
        "eva02-b16@224 b4096",
        "eva02-b16@224 b16384",
        "eva02-b16@224 b32768",
        "eva02-b16@224 b65536",
        "eva02-l14@224 b32768",
        "eva02-bige14@224 b16384",
        "eva02-bige14@224 b131072",
    ),
}


def _inputs(shape: Shape, draw: Draw, **scalars: float) -> Inputs:
    """A pair of features for each image of the shape; both towers end in the same space."""
    size = (shape.batch, shape.embed_dim)
    features = {name: draw.normal(*size, dtype=torch.float32) for name in ("image_features", "text_features")}
    return {name: F.normalize(values, dim=-1).to(draw.dtype) for name, values in features.items()} | {
        name: torch.tensor(value, device=draw.device) for name, value in scalars.items()
    }


def _work(shape: Shape, itemsize: int) -> Work:
    """One matmul of the features forward, two backward: the gradients of either side.

    A loss that doesn't save the B x B matrix needs a third matmul backward; the floor doesn't count it. Bytes of the
    features and of their gradients; a matrix of logits is neither input nor output.
    """
    product = 2 * shape.batch**2 * shape.embed_dim
    features = 2 * shape.batch * shape.embed_dim * itemsize
    return Work(Cost(product, features), Cost(2 * product, 2 * features))


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """InfoNCE in plain PyTorch: the mean of two cross-entropies over one matrix of logits."""
    logits = _widened(logit_scale * image_features @ text_features.T)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def siglip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """The sigmoid loss in plain PyTorch, over a matrix of logits and one of signs."""
    logits = _widened(logit_scale * image_features @ text_features.T) + logit_bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def _widened(logits: Tensor) -> Tensor:
    """Logits, or a peer's loss, in float32 at least, as under autocast."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


_CLIP_LOSS = register(
    Operation(
        name="clip_loss",
        summary="symmetric InfoNCE over a batch of pairs",
        inputs=partial(_inputs, logit_scale=CLIP_SCALE),
        eager=clip_loss,
        ours=evakernels.clip_loss,
        work=_work,
        shapes=_SHAPES,
        raw=lambda pairs, channels: Shape(batch=pairs, embed_dim=channels),
        small="4x64",
        gradients=("image_features", "text_features", "logit_scale"),
        registered="contrastive_forward",
    )
)
register(
    replace(
        _CLIP_LOSS,
        name="siglip_loss",
        summary="sigmoid loss over all combinations of a batch of pairs",
        inputs=partial(_inputs, logit_scale=SIGLIP_SCALE, logit_bias=SIGLIP_BIAS),
        eager=siglip_loss,
        ours=evakernels.siglip_loss,
        shapes=_SHAPES | {"cpu": _SHAPES["cpu"][:2]},
        gradients=("image_features", "text_features", "logit_scale", "logit_bias"),
        registered="siglip_forward",
    )
)


@peer("clip_loss", package="open_clip_torch")
@peer("siglip_loss", package="open_clip_torch")
def open_clip(shape: Shape) -> Function:
    """open_clip's losses, as its trainer calls them: under autocast for features of 16 bits."""
    from open_clip.loss import ClipLoss, SigLipLoss

    clip, siglip = ClipLoss(), SigLipLoss()

    def call(image_features: Tensor, text_features: Tensor, **scalars: Tensor) -> Tensor:
        dtype, loss = image_features.dtype, siglip if "logit_bias" in scalars else clip
        with torch.autocast(image_features.device.type, dtype=dtype, enabled=dtype.itemsize == 2):
            return _widened(loss(image_features, text_features, **scalars))

    return call


@peer("clip_loss", package="inf-cl", devices=("cuda",))
def inf_cl(shape: Shape) -> Function:
    """Inf-CL's Triton kernels on one GPU, once for each direction; it widens all features to float32."""
    from inf_cl import cal_flash_loss

    return _both_directions(lambda queries, keys, scale, labels: cal_flash_loss(queries, keys, scale=scale).mean())


@peer("clip_loss", package="cut-cross-entropy", devices=("cuda",))
def cut_cross_entropy(shape: Shape) -> Function:
    """Apple's cut cross-entropy, once for each direction, with the other side's features as classes.

    Without its filter, which drops probabilities below eps / 32: nearly all of them at the start of training.
    """
    from cut_cross_entropy import linear_cross_entropy

    return _both_directions(
        lambda queries, keys, scale, labels: linear_cross_entropy(scale * queries, keys, labels, filter_eps=None)
    )


@peer("clip_loss", package="liger-kernel", devices=("cuda",))
def liger(shape: Shape) -> Function:
    """Liger-Kernel's fused linear cross-entropy, once for each direction, with the other side's features as classes.

    It computes the gradients in its forward pass.
    """
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    cross_entropy = LigerFusedLinearCrossEntropyLoss()
    return _both_directions(lambda queries, keys, scale, labels: cross_entropy(keys, scale * queries, labels))


def _both_directions(direction: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Function:
    """InfoNCE from the cross-entropy of one direction, `direction(queries, keys, scale, labels)`."""

    def call(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        labels = torch.arange(len(image_features), device=image_features.device)
        of_images = direction(image_features, text_features, logit_scale, labels)
        of_texts = direction(text_features, image_features, logit_scale, labels)
        return _widened(of_images + of_texts) / 2

    return call
