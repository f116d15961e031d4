"""The vision tower once more, from a state dict and the equations alone, in plain PyTorch."""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from evaclip import VisionConfig


def plain_vision(state, config, images, token_index=None):
    """What `VisionTower` should return for `images`; `token_index` [B, K] are the patches that are kept."""
    x = plain_tokens(state, plain_patches(state, config, images))
    angles = plain_angles(config).to(x.dtype).expand(len(x), -1, -1)
    if token_index is not None:
        rows = torch.arange(len(x))[:, None]
        x = torch.cat([x[:, :1], x[:, 1:][rows, token_index]], dim=1)
        angles = angles[rows, token_index]
    x = plain_blocks(state, config, x, angles)
    if config.pool == "token":
        pooled = plain_norm(state, "norm", config, x)[:, 0]
    else:
        pooled = plain_norm(state, "fc_norm", config, x[:, 1:].mean(1))
    return F.linear(pooled, state["head.weight"], state.get("head.bias"))


def plain_patches(state, config, images):
    """`[B, patches, width]`."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=config.patch_size)
    return x.flatten(2).transpose(1, 2)


def plain_tokens(state, patches):
    """With the class token in front, and their positions."""
    return torch.cat([state["cls_token"].expand(len(patches), -1, -1), patches], dim=1) + state["pos_embed"]


def plain_blocks(state, config, x, angles, name="blocks"):
    """All blocks of this name; `angles` `[B, N - 1, head_dim]` turn the tokens behind the first."""
    for index in range(sum(bool(re.fullmatch(rf"{name}\.\d+\.norm1\.weight", key)) for key in state)):
        block = {k.removeprefix(f"{name}.{index}."): v for k, v in state.items()}
        x = _block(block, config, x, angles)
    return x


def turn_exactly(model):
    """Tables of rotations are made in float32; here they are what the equations have."""
    angles = plain_angles(model.config)[:, ::2]
    model.rope.cos, model.rope.sin = angles.cos(), angles.sin()


def plain_angles(config: VisionConfig) -> Tensor:
    """Angle of each channel of a head, [patches, head_dim], written out one by one."""
    bands, (rows, columns) = config.head_dim // 4, config.grid
    table = torch.zeros(config.num_patches, config.head_dim, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            for band in range(bands):
                frequency = config.rope_theta ** (-band / bands) * config.pt_hw_seq_len
                patch = table[row * columns + column]
                patch[2 * band : 2 * band + 2] = row * frequency / rows
                patch[2 * bands + 2 * band : 2 * bands + 2 * band + 2] = column * frequency / columns
    return table


def plain_norm(state: Mapping[str, Tensor], name: str, config: VisionConfig, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    if config.norm == "rms_norm":
        return F.rms_norm(x, weight.shape, weight, config.norm_eps)
    return F.layer_norm(x, weight.shape, weight, state[f"{name}.bias"], config.norm_eps)


def _block(state: Mapping[str, Tensor], config: VisionConfig, x: Tensor, angles: Tensor) -> Tensor:
    for norm, gamma, branch in (("norm1", "gamma_1", _attention), ("norm2", "gamma_2", _mlp)):
        if config.post_norm:
            y = plain_norm(state, norm, config, branch(state, config, x, angles))
        else:
            y = branch(state, config, plain_norm(state, norm, config, x), angles)
        x = x + state.get(gamma, 1) * y
    return x


def _attention(state: Mapping[str, Tensor], config: VisionConfig, x: Tensor, angles: Tensor) -> Tensor:
    if "attn.qkv.weight" in state:
        q, k, v = F.linear(x, state["attn.qkv.weight"]).chunk(3, dim=-1)
    else:
        q, k, v = (F.linear(x, state[f"attn.{name}_proj.weight"]) for name in "qkv")
    if "attn.q_bias" in state:
        q, v = q + state["attn.q_bias"], v + state["attn.v_bias"]
    q, k, v = (t.unflatten(-1, (config.heads, -1)).transpose(1, 2) for t in (q, k, v))
    if config.rope:
        q, k = _rotate(q, angles), _rotate(k, angles)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    if config.sub_norm and config.attn_sub_norm:
        out = plain_norm(state, "attn.inner_attn_ln", config, out)
    return F.linear(out, state["attn.proj.weight"], state["attn.proj.bias"])


def _rotate(t: Tensor, angles: Tensor) -> Tensor:
    cls, patches = t[:, :, :1], t[:, :, 1:]
    even, odd = patches[..., 0::2], patches[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    angles = angles[:, None]
    return torch.cat([cls, patches * angles.cos() + turned * angles.sin()], dim=2)


def _mlp(state: Mapping[str, Tensor], config: VisionConfig, x: Tensor, _: Tensor) -> Tensor:
    def linear(name: str, t: Tensor) -> Tensor:
        return F.linear(t, state[f"mlp.{name}.weight"], state[f"mlp.{name}.bias"])

    if config.mlp == "gelu":
        return linear("fc2", F.gelu(linear("fc1", x)))
    hidden = F.silu(linear("w1", x)) * linear("w2", x)
    return linear("w3", plain_norm(state, "mlp.ffn_ln", config, hidden) if config.sub_norm else hidden)
