"""Replacements for open_clip: both towers, their blocks, the losses. Its towers of timm have timm's replacements."""

import dataclasses
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._modes import is_observed
from ..autocast import is_on, matmul_inputs
from ..nn import linear
from ..ops import clip_loss, contrastive_statistics, rope_attention, token_dropout
from ..ops.contrastive import MEMORY_BUDGET, siglip_sum
from . import _pooling
from ._dispatch import attention_op, dispatches_to
from ._fused import add, add_norm, may_drop
from ._replacement import Call, Replacement, draw
from ._swap import AcceleratedModule
from .timm import LayerNorm, block_gate, masked_calls
from .torch_modules import LayerScale, is_causal_mask, require_1d
from .torch_modules import QuickGELU as _QuickGELU


class QuickGELU(_QuickGELU):
    """open_clip's QuickGELU; its argument is `x`."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


# --- blocks ---------------------------------------------------------------------------------------------------------


class ResidualAttentionBlock(AcceleratedModule):
    """A block with torch's attention."""

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        crosses = hasattr(self, "ln_1_kv")
        k_x = self.ln_1_kv(k_x) if crosses and k_x is not None else None
        v_x = self.ln_1_kv(v_x) if crosses and v_x is not None else None
        queries = self.ln_1(q_x)
        if self.selection is not None:
            k_x = v_x = queries
            q_x, queries = self.selection(q_x), self.selection(queries)
            attn_mask = None if attn_mask is None else self.selection.select_mask_rows(attn_mask, self.attn.num_heads)
        branch = self.attention(q_x=queries, k_x=k_x, v_x=v_x, attn_mask=attn_mask)
        y, x = add_norm(q_x, branch, self.ln_2, self.ls_1, forced=self.is_forced)
        return add(x, self.mlp(y), self.ls_2)


class CustomResidualAttentionBlock(AcceleratedModule):
    """A block with open_clip's attention."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        branch = self.ln_attn(self.attn(self.ln_1(x), attn_mask=attn_mask))
        y, x = add_norm(x, branch, self.ln_2, self.ls_1, forced=self.is_forced)
        return add(x, self.mlp(y), self.ls_2)


class Attention(AcceleratedModule):
    """open_clip's own, without a mask."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Any:
        norms = [getattr(self, name) for name in ("ln_q", "ln_k") if hasattr(self, name)]
        plain = attn_mask is None and not may_drop(self.attn_drop)
        plain = plain and not any(map(is_observed, norms))  # hooks see heads first
        if not (plain and dispatches_to(attention_op(), x, after_linear=True, forced=self.is_forced)):
            return super().forward(x, attn_mask=attn_mask)
        packed = linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in packed.chunk(3, dim=-1))
        if hasattr(self, "ln_q"):
            q, k = self.ln_q(q), self.ln_k(k)
        out = rope_attention(q, k, v)
        if self.head_scale is not None:
            out = out * self.head_scale.view(-1, 1)
        out = out.flatten(2)
        return self.out_drop(self.out_proj(self.ln_inner(out) if hasattr(self, "ln_inner") else out))


def _require_dot_products(module: Any) -> str | None:
    return _require_batch_first(module) or (None if module.logit_scale is None else "its scores are cosines")


# --- towers ---------------------------------------------------------------------------------------------------------


def _require_batch_first(module: Any) -> str | None:
    return None if getattr(module, "batch_first", True) else "its sequences come first"


def _require_class_token(module: Any) -> str | None:
    """Why the last block has to compute all patches."""
    read = module.pool_type == "tok" and module.attn_pool is None and not module.output_tokens
    return _require_batch_first(module.transformer) if read else "all of its tokens are read"


def _require_one_token(module: Any) -> str | None:
    """Why a text tower has to compute more tokens than one."""
    pool = getattr(module, "text_pool_type", getattr(module, "pool_type", None))
    pools_class_token = getattr(module, "cls_emb", None) is not None or getattr(module, "use_pad_mask", False)
    read = pool in ("argmax", "last") and not pools_class_token and not getattr(module, "output_tokens", False)
    return _require_batch_first(module.transformer) if read else "all of its tokens are read"


_PATH = ("transformer", "resblocks")
_VISION = _pooling.Pooling(
    _PATH, "ln_post", torch.nn.MultiheadAttention, ("_pool", "_global_pool"), _require_class_token
)
_TEXT = _pooling.Pooling(_PATH, "ln_final", torch.nn.MultiheadAttention, ("_embeds",), _require_one_token)
_CLIP = dataclasses.replace(_TEXT, other=("visual",))


class VisionTower(AcceleratedModule):
    """A vision tower that pools its class token."""

    def forward(self, x: Tensor) -> Any:
        tower: Any = _VISION.shorten(self, _pooling.Selection()) if _VISION.can_shorten(self, x) else self
        return super(VisionTower, tower).forward(x)


class TextTower(AcceleratedModule):
    """A text tower that pools its end token or its last token."""

    def forward(self, text: Tensor) -> Any:
        tower, text = _shorten_text(self, text, "pool_type")
        return super(TextTower, tower).forward(text)


class Clip(AcceleratedModule):
    """A model that is its own text tower."""

    method = "encode_text"

    def encode_text(self, text: Tensor, normalize: bool = False) -> Any:
        tower, text = _shorten_text(self, text, "text_pool_type")
        return super(Clip, tower).encode_text(text, normalize)  # type: ignore[misc]


def _shorten_text(tower: Any, text: Tensor, pool: str) -> tuple[Any, Tensor]:
    """A view of a text tower with a last block that returns the pooled token, and the text for it.

    Tokens after the end don't change the features of a causal tower. On a CPU the text is cut there; on a GPU that
    would need a synchronisation.
    """
    mask = tower.attn_mask
    if not _TEXT.can_shorten(tower, text) or text.dim() != 2 or text.shape[0] == 0:
        return tower, text
    if mask is not None and mask.shape[-1] != text.shape[1]:
        return tower, text
    pools_end, length = getattr(tower, pool) == "argmax", text.shape[1]
    rows = text.argmax(-1) if pools_end else torch.full(text.shape[:1], length - 1, device=text.device)
    changes: dict[str, Any] = {pool: "first"}
    parts = tower.token_embedding, *tower.transformer.modules()
    if pools_end and mask is not None and is_causal_mask(mask) and not any(map(is_observed, parts)):
        length = int(rows.max()) + 1
        positions = tower.positional_embedding[:length]
        changes.update(attn_mask=mask[:length, :length], positional_embedding=positions)
    return _TEXT.shorten(tower, _pooling.Selection(rows), **changes), text[:, :length]


class PatchDropout(AcceleratedModule):
    """Patch dropout with the same random numbers; one gather returns class token and kept patches."""

    def forward(self, x: Tensor) -> Any:
        drops_patches = self.training and self.prob > 0
        if not (drops_patches and dispatches_to("token_dropout", x, forced=self.is_forced)):
            return super().forward(x)
        prefix = 1 if self.exclude_first_token else 0
        batch, patches = x.shape[0], x.shape[1] - prefix
        count = max(1, int(patches * (1 - self.prob)))
        keep = torch.randn(batch, patches).topk(count, dim=-1).indices + prefix
        if prefix:
            keep = torch.cat((keep.new_zeros(batch, 1), keep), 1)
        return token_dropout(x, keep.to(x.device))


# --- losses ---------------------------------------------------------------------------------------------------------


class ClipLoss(AcceleratedModule):
    """CLIP's loss from log-sum-exps instead of logits, with open_clip's own exchange between ranks."""

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *args: Any, **options: Any
    ) -> Any:
        # Before 2.32 there was no bias, and the fourth argument was another.
        inputs, biased = (image_features, text_features, logit_scale), options.get("logit_bias") is not None
        if args or biased or not _can_fuse("clip_loss", *inputs, forced=self.is_forced):
            return super().forward(*inputs, *args, **options)
        image, text, *gathered = matmul_inputs(*self._gather(image_features, text_features))
        if self.world_size > 1 and self.local_loss:
            offset = len(image) * self.rank
            ours = contrastive_statistics(image, gathered[1], logit_scale, offset, memory_budget=MEMORY_BUDGET)
            theirs = contrastive_statistics(text, gathered[0], logit_scale, offset, memory_budget=MEMORY_BUDGET)
            loss = ((ours[0] - ours[2]) + (theirs[0] - theirs[2])).mean() / 2
        else:
            image, text = gathered or (image, text)
            loss = clip_loss(image, text, logit_scale, group=False)
        loss = loss.to(_loss_dtype(image_features, logit_scale))
        return {"contrastive_loss": loss} if options.get("output_dict") else loss

    def _gather(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """The features of this rank, followed by the features of all ranks if there are several."""
        if self.world_size == 1:
            return image, text
        gather = sys.modules["open_clip.loss"].gather_features
        options = "local_loss", "gather_with_grad", "rank", "world_size", "use_horovod"
        return image, text, *gather(image, text, **{name: getattr(self, name) for name in options})


class SigLipLoss(AcceleratedModule):
    """SigLIP's loss by one matmul with the texts of all ranks; each exchange of open_clip has equal results."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        output_dict: bool = False,
    ) -> Any:
        inputs = image_features, text_features, logit_scale, logit_bias
        if logit_bias is None or not _can_fuse("siglip_loss", *inputs, forced=self.is_forced):
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        dtype = _loss_dtype(image_features, logit_scale)
        texts, rows, rank = text_features, len(image_features), 0
        if self.world_size > 1:
            from torch.distributed.nn.functional import all_gather

            texts, rank = torch.cat(all_gather(text_features)), self.rank
        image, texts = matmul_inputs(image_features, texts)
        loss = (siglip_sum(image, texts, logit_scale, logit_bias, rows * rank) / rows).to(dtype)
        return {"contrastive_loss": loss} if output_dict else loss


def _can_fuse(op: str, image: Tensor, text: Tensor, *scalars: Any, forced: bool) -> bool:
    ones = all(isinstance(scalar, Tensor) and scalar.numel() == 1 for scalar in scalars)
    is_faster = ones and dispatches_to(op, image, after_linear=True, forced=forced)
    return is_faster and image.dtype == text.dtype and image.shape == text.shape


def _loss_dtype(image: Tensor, logit_scale: Tensor) -> torch.dtype:
    """The dtype of torch's cross-entropy of these logits."""
    return torch.float32 if is_on(image.device.type) else torch.result_type(image, logit_scale)


# --- arguments for the comparison -------------------------------------------------------------------------------------


def _block_calls(module: Any, x: Tensor) -> list[Call]:
    mask = draw(x.shape[1], x.shape[1])
    return [((x,), {}), ((x,), {"attn_mask": mask}), ((x[:, :3],), {"k_x": x, "v_x": x.flip(1)})]


def _image_calls(module: Any, x: Tensor) -> list[Call]:
    return [((draw(2, module.conv1.weight.shape[1], *module.image_size).requires_grad_(),), {})]


def _text_calls(module: Any, x: Tensor) -> list[Call]:
    last, length = module.token_embedding.weight.shape[0] - 1, module.positional_embedding.shape[0]
    text = 1 + torch.arange(2 * length).view(2, length) * 7 % (last - 1)
    text[0, 5], text[0, 6:] = last, 0
    return [((text,), {}), ((text,), {"normalize": True})]


def _loss_calls(module: Any, x: Tensor) -> list[Call]:
    image, text = F.normalize(x, dim=-1).flatten(0, 1).chunk(2)
    options = {"image_features": image, "text_features": text, "logit_scale": x.new_tensor(10.0).requires_grad_()}
    biased = {**options, "logit_bias": x.new_tensor(-2.0).requires_grad_()}
    calls: list[Call] = [((), {**o, **form}) for o in (options, biased) for form in ({}, {"output_dict": True})]
    return calls[2:] if hasattr(module, "_loss") else calls


_TRANSFORMER, _LOSS = "open_clip.transformer", "open_clip.loss"
_ONE_RANK = (("rank", 0), ("world_size", 1))


def _tower(
    forward: type[AcceleratedModule], name: str, token: str, pooling: _pooling.Pooling, **more: Any
) -> Replacement:
    return Replacement(forward, name, "torch", f"last block, {token}", tower=pooling, constants=("attn_mask",), **more)


REPLACEMENTS = (
    Replacement(LayerNorm, f"{_TRANSFORMER}.LayerNorm", "layer_norm", reason=require_1d, role="layer_norm"),
    Replacement(LayerNorm, f"{_TRANSFORMER}.LayerNormFp32", "layer_norm", reason=require_1d, role="layer_norm"),
    Replacement(LayerScale, f"{_TRANSFORMER}.LayerScale", role="layer_scale"),
    Replacement(QuickGELU, f"{_TRANSFORMER}.QuickGELU", "quick_gelu"),
    Replacement(ResidualAttentionBlock, f"{_TRANSFORMER}.ResidualAttentionBlock", block_gate, calls=_block_calls),
    Replacement(
        CustomResidualAttentionBlock, f"{_TRANSFORMER}.CustomResidualAttentionBlock", block_gate, calls=masked_calls
    ),
    Replacement(Attention, f"{_TRANSFORMER}.Attention", "attention", reason=_require_dot_products, calls=masked_calls),
    Replacement(PatchDropout, f"{_TRANSFORMER}.PatchDropout", "token_dropout"),
    _tower(VisionTower, f"{_TRANSFORMER}.VisionTransformer", "class token", _VISION, calls=_image_calls),
    _tower(TextTower, f"{_TRANSFORMER}.TextTransformer", "end token", _TEXT, calls=_text_calls),
    _tower(Clip, "open_clip.model.CLIP", "end token", _CLIP, calls=_text_calls),
    Replacement(ClipLoss, f"{_LOSS}.ClipLoss", "clip_loss", "clip_loss", calls=_loss_calls, settings=_ONE_RANK),
    Replacement(SigLipLoss, f"{_LOSS}.SigLipLoss", "siglip_loss", "siglip_loss", calls=_loss_calls, settings=_ONE_RANK),
)
