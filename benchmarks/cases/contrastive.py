"""Contrastive losses over one batch of pairs: InfoNCE, and the sigmoid loss of SigLIP."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import evakernels
from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, Work, peer, register
from benchmarks.shapes import Shape

# Start values of training: CLIP's temperature, and the temperature and bias of SigLIP (Zhai et al. 2023).
CLIP_SCALE = 1 / 0.07
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0

# At the largest, matrices of logits fill a GPU: who makes them fails there, and that is a row too.
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


def _raw(pairs: int, channels: int) -> Shape:
    return Shape(batch=pairs, embed_dim=channels)


def _pairs(shape: Shape, draw: Draw) -> Inputs:
    """As many pairs as the shape has images; the tower doesn't matter, both end in the same space."""
    size = (shape.batch, shape.embed_dim)
    return {name: _features(draw, *size) for name in ("image_features", "text_features")}


def _features(draw: Draw, *size: int) -> Tensor:
    return F.normalize(draw.normal(*size, dtype=torch.float32), dim=-1).to(draw.dtype)


def _scalar(draw: Draw, value: float) -> Tensor:
    return torch.tensor(value, device=draw.device)


def _clip_inputs(shape: Shape, draw: Draw) -> Inputs:
    return {**_pairs(shape, draw), "logit_scale": _scalar(draw, CLIP_SCALE)}


def _siglip_inputs(shape: Shape, draw: Draw) -> Inputs:
    scalars = {"logit_scale": _scalar(draw, SIGLIP_SCALE), "logit_bias": _scalar(draw, SIGLIP_BIAS)}
    return {**_pairs(shape, draw), **scalars}


def _work(shape: Shape, itemsize: int) -> Work:
    """One product of the features forward, two backward: the gradients of either side.

    Who doesn't keep the B x B matrix needs a third one backward to form it again, so the floor is that of keeping it;
    the sigmoid loss needs none, for its gradients can be formed with its value.
    Bytes are those of the features and of their gradients; no scalar counts, and no matrix of logits, for it is neither
    input nor output.
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
    """Logits, or a peer's loss, in float32 at least, in which autocast computes one."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


_CLIP_LOSS = register(
    Operation(
        name="clip_loss",
        summary="symmetric InfoNCE over a batch of pairs",
        inputs=_clip_inputs,
        eager=clip_loss,
        ours=evakernels.clip_loss,
        work=_work,
        shapes=_SHAPES,
        raw=_raw,
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
        inputs=_siglip_inputs,
        eager=siglip_loss,
        ours=evakernels.siglip_loss,
        shapes=_SHAPES | {"cpu": _SHAPES["cpu"][:2]},
        gradients=("image_features", "text_features", "logit_scale", "logit_bias"),
        registered="siglip_forward",
    )
)


@peer("clip_loss", package="open_clip_torch")
def open_clip_loss(shape: Shape) -> Function:
    """open_clip's loss, as its trainer calls it."""
    from open_clip.loss import ClipLoss

    return _under_autocast(ClipLoss())


@peer("siglip_loss", package="open_clip_torch")
def open_clip_siglip(shape: Shape) -> Function:
    """open_clip's sigmoid loss, as its trainer calls it."""
    from open_clip.loss import SigLipLoss

    return _under_autocast(SigLipLoss())


def _under_autocast(loss: Function) -> Function:
    """A loss in the surroundings that open_clip's trainer gives it where the features have 16 bits."""

    def call(image_features: Tensor, text_features: Tensor, **scalars: Tensor) -> Tensor:
        dtype = image_features.dtype
        with torch.autocast(image_features.device.type, dtype=dtype, enabled=dtype.itemsize == 2):
            return _widened(loss(image_features, text_features, **scalars))

    return call


@peer("clip_loss", package="inf-cl", devices=("cuda",))
def inf_cl(shape: Shape) -> Function:
    """Inf-CL's Triton kernels on one GPU, once for each direction; it widens all features to float32."""
    from inf_cl import cal_flash_loss

    def direction(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        losses: Tensor = cal_flash_loss(queries, keys, scale=scale)
        return losses.mean()

    return _both_directions(direction)


@peer("clip_loss", package="cut-cross-entropy", devices=("cuda",))
def cut_cross_entropy(shape: Shape) -> Function:
    """Apple's cut cross-entropy, once for each direction, the other side's features being the classes.

    Without its filter, which drops probabilities below eps / 32: at the start of training, that is nearly all of them.
    """
    from cut_cross_entropy import linear_cross_entropy

    def direction(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(len(keys), device=keys.device)
        loss: Tensor = linear_cross_entropy(scale * queries, keys, labels, filter_eps=None)
        return loss

    return _both_directions(direction)


@peer("clip_loss", package="liger-kernel", devices=("cuda",))
def liger(shape: Shape) -> Function:
    """Liger-Kernel's fused linear cross-entropy, once for each direction, the other side's features being the classes.

    It computes the gradients in its forward pass.
    """
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    cross_entropy = LigerFusedLinearCrossEntropyLoss()

    def direction(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(len(keys), device=keys.device)
        loss: Tensor = cross_entropy(keys, scale * queries, labels)
        return loss

    return _both_directions(direction)


def _both_directions(direction: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
    """InfoNCE from the cross-entropy of one direction."""

    def call(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        of_images = direction(image_features, text_features, logit_scale)
        return _widened(of_images + direction(text_features, image_features, logit_scale)) / 2

    return call
