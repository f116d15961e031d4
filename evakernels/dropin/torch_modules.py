"""Replacements for torch's own modules."""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import is_on
from ..nn import FrozenWeight, linear
from ..ops import gelu, layer_norm, rms_norm, rope_attention
from ._dispatch import attention_op, dispatches_to
from ._fused import add, add_norm, draw_rows, read_norm, role
from ._replacement import Call, Replacement, draw
from ._swap import AcceleratedModule


class Linear(AcceleratedModule):
    """A linear layer; on a CPU by oneDNN where that is faster."""

    linear_weights = ("weight",)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, forced=self.is_forced)


class LayerNorm(AcceleratedModule):
    """LayerNorm over the last dimension."""

    def forward(self, input: Tensor) -> Any:
        fused = dispatches_to("layer_norm", input, forced=self.is_forced)
        if fused and (parameters := read_norm(self, input)) is not None:
            return layer_norm(input, *parameters)
        return super().forward(input)


class RMSNorm(AcceleratedModule):
    """RMSNorm over the last dimension."""

    def forward(self, x: Tensor) -> Any:
        fused = dispatches_to("rms_norm", x, forced=self.is_forced)
        if fused and (parameters := read_norm(self, x)) is not None:
            weight, _, eps = parameters
            return rms_norm(x, weight, eps)
        return super().forward(x)


class GELU(AcceleratedModule):
    """GELU in the form of torch's module or, in classes without this attribute, by tanh."""

    approximate = "tanh"

    def forward(self, input: Tensor) -> Any:
        if dispatches_to(_gelu_gate(self), input, forced=self.is_forced):
            if input.is_contiguous():
                return gelu(input, approximate=self.approximate)
            # The op's output is contiguous; convolutions are slower, and dropout draws others, in another layout.
            if input.is_contiguous(memory_format=torch.channels_last):
                return gelu(input.permute(0, 2, 3, 1), approximate=self.approximate).permute(0, 3, 1, 2)
        return super().forward(input)


class QuickGELU(GELU):
    """CLIP's QuickGELU, of three libraries."""

    approximate = "sigmoid"


# --- attention ------------------------------------------------------------------------------------------------------


class MultiheadAttention(AcceleratedModule):
    """Attention of a sequence to itself or to another, which is both keys and values.

    torch transposes sequences with `batch_first`. If the weight needs no gradient either, its matmul then copies the
    weight for each token, which this forward avoids.
    """

    linear_weights = ("in_proj_weight",)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        plain = key is value and key_padding_mask is None and not is_causal and not (self.training and self.dropout > 0)
        if not (plain and self._can_fuse(query, key, attn_mask)):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = self._project(query, key)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        weights = None
        if need_weights:
            out, weights = self._weigh(q, k, v, attn_mask)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = self._attend(q, k, v, attn_mask)
        return linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias), weights

    def _can_fuse(self, query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
        # torch's code would make a frozen weight dense in each call.
        forced = self.is_forced or isinstance(self.in_proj_weight, FrozenWeight)
        if not dispatches_to("multi_head", key, after_linear=True, forced=forced):
            return False
        mask_fits = mask is None or (mask.dim() in (2, 3) and mask.is_floating_point())
        fits = query.dim() == key.dim() == 3 and query.dtype == key.dtype
        return fits and mask_fits

    def _project(self, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, `[B, N, heads, head_dim]`."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key:
            parts = linear(query, weight, bias).chunk(3, dim=-1)
        else:
            sizes = [self.embed_dim, 2 * self.embed_dim]
            query_part, key_part = zip(
                weight.split(sizes), (None, None) if bias is None else bias.split(sizes), strict=True
            )
            parts = linear(query, *query_part), *linear(key, *key_part).chunk(2, dim=-1)
        return tuple(part.unflatten(-1, (self.num_heads, -1)) for part in parts)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`[B, N, heads, head_dim]`."""
        causal = mask is not None and mask.dim() == 2 and is_causal_mask(mask)
        if q.shape == k.shape and (mask is None or causal) and dispatches_to(attention_op(), q, forced=self.is_forced):
            return rope_attention(q, k, v, causal=causal)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention with its weights, `[B, heads, queries, keys]`."""
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        scores = q * self.head_dim**-0.5 @ k.mT
        # Under autocast the scores have another dtype than the mask.
        weights = (scores if mask is None else scores + mask.to(scores.dtype)).softmax(-1)
        return (weights @ v).transpose(1, 2), weights


def is_causal_mask(mask: Tensor) -> bool:
    """Whether the mask hides later keys and nothing else; False on a GPU, where reading it would synchronise."""
    if not mask.is_cpu or torch.compiler.is_compiling() or mask.shape[0] != mask.shape[1]:
        return False
    return torch.equal(mask, _causal_mask(mask.shape[0], mask.dtype))


@lru_cache(8)
def _causal_mask(tokens: int, dtype: torch.dtype) -> Tensor:
    return torch.full((tokens, tokens), float("-inf"), dtype=dtype).triu_(1)


def _require_packed(module: Any) -> str | None:
    if not module.batch_first:
        return "its sequences come first"
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return "its keys have a width or a bias of their own"
    return None


def _attention_calls(module: Any, x: Tensor) -> list[Call]:
    causal, any_mask = _causal_mask(x.shape[1], x.dtype), draw(x.shape[1], x.shape[1])
    head_mask = draw(x.shape[0] * module.num_heads, 1, x.shape[1])
    padding = torch.arange(x.shape[1]).expand(x.shape[0], -1) > 8
    plain: dict[str, Any] = {"need_weights": False}
    itself, one, other = (x, x, x), (x[:, :1], x, x), (x, x.flip(1), x)
    return [
        (itself, plain),
        (itself, {**plain, "attn_mask": causal, "is_causal": True}),
        (itself, {**plain, "attn_mask": any_mask}),
        (itself, {"average_attn_weights": False}),
        (one, {"attn_mask": head_mask}),
        (other, {"key_padding_mask": padding}),
    ]


class TransformerEncoderLayer(AcceleratedModule):
    """An encoder layer without torch's fast path for inference, which calls none of its children."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        if src_key_padding_mask is not None or not self._can_fuse(src, src_mask):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x, forced = src, self.is_forced
        if self.norm_first:
            y, x = add_norm(x, self._sa_block(self.norm1(x), src_mask, None), self.norm2, forced=forced)
            return add(x, self._ff_block(y))
        x, _ = add_norm(x, self._sa_block(x, src_mask, None), self.norm1, forced=forced)
        y, _ = add_norm(x, self._ff_block(x), self.norm2, forced=forced)
        return y

    def _can_fuse(self, src: Tensor, mask: Tensor | None) -> bool:
        if not dispatches_to("multi_head", src, after_linear=True, forced=self.is_forced) or src.is_nested:
            return False
        if is_on("cpu") and not self.training:  # torch's fast path then returns another dtype
            return False
        return isinstance(self.self_attn, MultiheadAttention) and (mask is None or mask.is_floating_point())


def _masked_calls(module: Any, x: Tensor) -> list[Call]:
    # With other masks of floats torch's fast path for inference makes NaN.
    causal, padding = _causal_mask(x.shape[1], x.dtype), torch.zeros(x.shape[:2], dtype=torch.bool)
    options: tuple[dict[str, Any], ...] = ({}, {"src_mask": causal}, {"src_mask": causal, "is_causal": True})
    return [*(((x,), kwargs) for kwargs in options), ((x,), {"src_key_padding_mask": padding})]


# --- children of fused steps ------------------------------------------------------------------------------------------


class Identity(AcceleratedModule):
    """The identity."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Dropout(AcceleratedModule):
    """Dropout of elements."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training, self.inplace)


class LayerScale(AcceleratedModule):
    """A factor of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        factor: Tensor = self.gamma if hasattr(self, "gamma") else self.lambda1
        return x * factor


class DropPath(AcceleratedModule):
    """Stochastic depth."""

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0 or not self.training:
            return x
        return x * draw_rows(self, x, x.dtype)


class SiLU(AcceleratedModule):
    """The activation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


# --- which modules --------------------------------------------------------------------------------------------------


def require_1d(module: Any) -> str | None:
    """Why a module isn't supported that norms more than the last dimension."""
    shape = getattr(module, "normalized_shape", (0,))
    return None if len(shape) == 1 else f"it normalises {len(shape)} dimensions"


def require_silu(module: Any) -> str | None:
    """The reason why a gated MLP isn't SwiGLU, or None."""
    act = getattr(module, "act_fn", getattr(module, "act", None))
    return None if role(act) == "silu" else f"its activation is {type(act).__name__}"


def _gelu_gate(module: Any) -> str:
    return {"tanh": "gelu", "none": "exact_gelu", "sigmoid": "quick_gelu"}[module.approximate]


_NORMS = "torch.nn.modules.normalization"

REPLACEMENTS = (
    Replacement(Linear, "torch.nn.modules.linear.Linear", "linear", "linear"),
    Replacement(LayerNorm, f"{_NORMS}.LayerNorm", "layer_norm", reason=require_1d, role="layer_norm"),
    Replacement(RMSNorm, f"{_NORMS}.RMSNorm", "rms_norm", "rms_norm", reason=require_1d, role="rms_norm"),
    Replacement(Identity, "torch.nn.modules.linear.Identity", role="identity"),
    Replacement(Dropout, "torch.nn.modules.dropout.Dropout", role="dropout"),
    Replacement(SiLU, "torch.nn.modules.activation.SiLU", role="silu"),
    Replacement(GELU, "torch.nn.modules.activation.GELU", _gelu_gate),
    Replacement(
        MultiheadAttention,
        "torch.nn.modules.activation.MultiheadAttention",
        "multi_head",
        "linear, rope_attention",
        reason=_require_packed,
        calls=_attention_calls,
    ),
    Replacement(
        TransformerEncoderLayer,
        "torch.nn.modules.transformer.TransformerEncoderLayer",
        "multi_head",
        "add_layer_norm",
        reason=lambda module: _require_packed(module.self_attn),
        calls=_masked_calls,
    ),
)
