"""The transformer block of the vision tower, with all options of the models."""

import math

import torch
from torch import Tensor, nn

from evaclip.model.config import VisionConfig
from evaclip.model.norm import Norm, Stream, product_dtype
from evaclip.model.tower import ResidualBlock
from evakernels import Packing, gelu, rope_attention
from evakernels.nn import Linear, SwiGLU, linear, rotate

INIT_STD = 0.02


def vision_norm(config: VisionConfig, width: int) -> Norm:
    """A norm of the tower's kind."""
    return Norm(width, config.norm, config.norm_eps)


def reset_linear(layer: nn.Linear, factor: float = 1.0) -> None:
    """Truncated normal weights times `factor`, bias 0."""
    nn.init.trunc_normal_(layer.weight, std=INIT_STD)
    with torch.no_grad():
        layer.weight.mul_(factor)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def cast_once(x: Tensor) -> Tensor:
    """`x` in the dtype of autocast, if it is on: otherwise each linear that reads `x` would cast it."""
    dtype = product_dtype(x)
    return x if dtype is None else x.to(dtype)


def class_tokens(x: Tensor, packing: Packing | None) -> Tensor:
    """`[B, 1, ...]` of tokens `[B, N, ...]`, or of packed rows `[T, ...]`."""
    return x[:, :1] if packing is None else packing.last(x).unsqueeze(1)


def _biased(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """`layer(x) + bias` by one matmul; a module in the layer's place, such as one with an adapter, is called."""
    if type(layer) is Linear:
        return linear(x, layer.weight, bias)
    y: Tensor = layer(x)
    return y if bias is None else y + bias.to(y.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions. `[B, N, width]` -> same, and packed rows `[T, width]` -> same.

    q and v have biases, k has none: it would shift all scores of a query alike, without effect.
    """

    q_bias: nn.Parameter | None
    v_bias: nn.Parameter | None

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.num_prefix = config.heads, config.prefix_tokens
        if config.sub_norm:
            self.q_proj = Linear(width, width, bias=False)
            self.k_proj = Linear(width, width, bias=False)
            self.v_proj = Linear(width, width, bias=False)
            self.inner_attn_ln = vision_norm(config, width) if config.attn_sub_norm else None
        else:
            self.qkv = Linear(width, 3 * width, bias=False)
        self.sub_norm = config.sub_norm
        for name in ("q_bias", "v_bias"):
            self.register_parameter(name, nn.Parameter(torch.zeros(width)) if config.qkv_bias else None)
        self.proj = Linear(width, width)

    def reset_parameters(self, branch_factor: float) -> None:
        """Initialize; the output projection is scaled by `branch_factor`."""
        if self.sub_norm:
            for layer in (self.q_proj, self.k_proj, self.v_proj):
                reset_linear(layer)
            if self.inner_attn_ln is not None:
                self.inner_attn_ln.reset_parameters()
        else:
            reset_linear(self.qkv)
        for bias in (self.q_bias, self.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        reset_linear(self.proj, branch_factor)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        token_index: Tensor | None = None,
        packing: Packing | None = None,
        pooled: bool = False,
    ) -> Tensor:
        """`cos` and `sin` as in `RotaryTable`, `token_index` the patches in `x`; None for all.

        `packing` describes packed rows; `token_index` is then the table's row of each. `pooled` computes the class
        token only, `[B, 1, width]`.
        """
        q, k, v = self._project(x, packing, pooled)
        if packing is None:
            # The tokens before the patches have no position in the image and aren't rotated.
            out = rope_attention(q, k, v, cos, sin, token_index=token_index, num_prefix=self.num_prefix)
        elif pooled:
            # The class token isn't rotated.
            k = k if cos is None or sin is None else rotate(k, cos.unsqueeze(1), sin.unsqueeze(1))
            out = packing.attend_once(q.squeeze(1), k, v).unsqueeze(1)
        else:
            out = packing.attend(q, k, v, cos=cos, sin=sin, positions=token_index)
        out = out.flatten(-2)
        if self.sub_norm and self.inner_attn_ln is not None:
            out = self.inner_attn_ln(out, out.dtype)  # the projection's dtype, under autocast too
        projected: Tensor = self.proj(out)
        return projected

    def _project(self, x: Tensor, packing: Packing | None, pooled: bool) -> tuple[Tensor, ...]:
        """q, k, v, `[..., heads, head_dim]`; of q only the class token if `pooled`."""
        width, queried = x.shape[-1], class_tokens(x, packing) if pooled else x
        parts: tuple[Tensor, ...]
        if self.sub_norm:
            parts = _biased(self.q_proj, queried, self.q_bias), self.k_proj(x), _biased(self.v_proj, x, self.v_bias)
        elif pooled and type(self.qkv) is Linear:
            q_weight, kv_weight = self.qkv.weight.split([width, 2 * width])
            bias = None if self.v_bias is None else torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
            parts = linear(queried, q_weight, self.q_bias), *linear(x, kv_weight, bias).chunk(2, dim=-1)
        else:
            bias = None
            if self.q_bias is not None and self.v_bias is not None:
                bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            q, k, v = _biased(self.qkv, x, bias).chunk(3, dim=-1)
            parts = class_tokens(q, packing) if pooled else q, k, v
        return tuple(part.unflatten(-1, (self.heads, -1)) for part in parts)


class GeluMlp(nn.Module):
    """MLP with GELU. `[..., width]` -> same."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.hidden)
        self.fc2 = Linear(config.hidden, config.width)
        self.approximate = "tanh" if config.mlp == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(gelu(self.fc1(x), approximate=self.approximate))
        return out


def _mlp(config: VisionConfig) -> SwiGLU | GeluMlp:
    if config.mlp == "swiglu":
        return SwiGLU(config.width, config.hidden, sub_ln=config.sub_norm, eps=config.norm_eps)
    return GeluMlp(config)


class Block(ResidualBlock):
    """Attention and MLP, each with its norm before or after it.

    `[B, N, width]`, or packed rows `[T, width]`, -> same, or the class tokens only, `[B, 1, width]`.
    """

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(self, config: VisionConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.post_norm = config.post_norm
        self.drop_path = config.drop_path * index / max(config.layers - 1, 1)
        self.layer_scale_init = config.layer_scale_init
        self.norm1 = vision_norm(config, config.width)
        self.attn = Attention(config)
        self.norm2 = vision_norm(config, config.width)
        self.mlp = _mlp(config)
        for name in ("gamma_1", "gamma_2"):
            scaled = config.layer_scale_init is not None
            self.register_parameter(name, nn.Parameter(torch.empty(config.width)) if scaled else None)
        # A norm or a factor after the MLP's last matmul reads its output again.
        self.kept_columns = None if self.post_norm or self.gamma_2 is not None else config.hidden

    def reset_parameters(self) -> None:
        """Initialize; the last matrix of each branch is scaled by 1 / sqrt(2 depth)."""
        branch_factor = 1 / math.sqrt(2 * (self.index + 1))
        self.norm1.reset_parameters()
        self.attn.reset_parameters(branch_factor)
        self.norm2.reset_parameters()
        self._reset_mlp(branch_factor)
        for scale in (self.gamma_1, self.gamma_2):
            if scale is not None and self.layer_scale_init is not None:
                nn.init.constant_(scale, self.layer_scale_init)

    def _reset_mlp(self, branch_factor: float) -> None:
        last = self.mlp.w3 if isinstance(self.mlp, SwiGLU) else self.mlp.fc2
        for module in self.mlp.children():
            if isinstance(module, nn.Linear):
                reset_linear(module, branch_factor if module is last else 1.0)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def attend(
        self,
        stream: Stream,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        token_index: Tensor | None = None,
        packing: Packing | None = None,
        pooled: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The other arguments as for `Attention`."""
        if self.post_norm:
            y = x = stream.total()
        else:
            y, x = stream.read(self.norm1, product_dtype(stream.x))
        branch: Tensor = self.attn(cast_once(y), cos, sin, token_index, packing, pooled)
        return class_tokens(x, packing) if pooled else x, branch

    def mix(self, x: Tensor, branch: Tensor, packing: Packing | None = None) -> Stream:
        row_scale = self._row_scale(x, packing)
        if self.post_norm:
            x = self.norm1.of_branch(x, branch, self.gamma_1, row_scale)
            return Stream(self.norm2.of_branch(x, self.mlp(cast_once(x)), self.gamma_2, self._row_scale(x, packing)))
        y, x = self.norm2.of_sum(x, branch, self.gamma_1, row_scale, product_dtype(x))
        return Stream(x, self.mlp(cast_once(y)), self.gamma_2, self._row_scale(x, packing))

    def _row_scale(self, x: Tensor, packing: Packing | None) -> Tensor | None:
        """Stochastic depth (Huang et al. 2016): 0 where the branch is skipped, else 1 / keep. `[B]`, or `[T]`."""
        if not self.training or self.drop_path == 0:
            return None
        keep = 1 - self.drop_path
        packed = packing if x.dim() == 2 else None
        images = x.shape[0] if packed is None else packed.batch
        scale = torch.rand(images, device=x.device).lt(keep).to(x.dtype) / keep
        return scale if packed is None else scale[packed.samples()]


class AttentionPool(nn.Module):
    """Attention of a learned query to the patches of each image, then an MLP (SigLIP, Zhai et al. 2023).

    The names of its parameters are timm's.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.norm = vision_norm(config, width)
        self.mlp = GeluMlp(config)

    def reset_parameters(self) -> None:
        """Initialize as timm."""
        nn.init.trunc_normal_(self.latent, std=self.latent.shape[2] ** -0.5)
        for layer in (self.q, self.kv, self.proj, self.mlp.fc1, self.mlp.fc2):
            reset_linear(layer)
        self.norm.reset_parameters()

    def forward(self, x: Tensor, patches: Packing) -> Tensor:
        """Rows `[T, width]` -> `[B, width]`; `patches` has the patches of each image."""
        q = self.q(self.latent[0]).expand(patches.batch, -1)
        parts = (part.unflatten(1, (self.heads, -1)) for part in (q, *self.kv(x).chunk(2, dim=1)))
        pooled: Tensor = self.proj(patches.attend_once(*parts).flatten(1))
        pooled = pooled + self.mlp(self.norm(pooled))
        return pooled
