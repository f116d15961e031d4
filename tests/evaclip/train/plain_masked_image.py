"""Masked image modelling once more, from a state dict and the papers' equations alone, in plain PyTorch.

EVA (arXiv 2211.07636, section 2): block-wise masked patches become a learned token, the loss is the negative cosine of
a linear layer behind the last norm and the CLIP features of the masked patches. EVA-02 (arXiv 2303.11331, section 2):
SwiGLU, a norm inside the MLP, two-dimensional rotary positions, Xavier's start values, no norm inside attention.
Masked autoencoders (arXiv 2111.06377, section 3): the encoder sees the visible patches alone.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from evaclip import VisionConfig

State = Mapping[str, Tensor]


def plain_loss(student: State, config: VisionConfig, images: Tensor, masked: Tensor, features: Tensor) -> Tensor:
    """Mean over all masked patches `masked` [B, K] of the batch; `features` [B, patches, width] are the teacher's."""
    losses = []
    for image, chosen, wanted in zip(images, masked.tolist(), features, strict=True):
        dropped = "decoder_norm.weight" in student
        tokens = _dropping(student, config, image, chosen) if dropped else _replacing(student, config, image, chosen)
        for patch in chosen:
            predicted = tokens[1 + patch] @ student["lm_head.weight"].T + student["lm_head.bias"]
            losses.append(-(predicted @ wanted[patch]) / (predicted.norm() * wanted[patch].norm()))
    return torch.stack(losses).mean()


def plain_features(tower: State, config: VisionConfig, images: Tensor) -> Tensor:
    """Each patch of a CLIP's image tower, behind the last norm and the projection, `[B, patches, embed_dim]`."""
    found = []
    for image in images:
        tokens = torch.cat([tower["cls_token"][0], _patches(tower, config, image)]) + tower["pos_embed"][0]
        tokens = _blocks(tower, "blocks", config, tokens, list(range(config.num_patches)))
        found.append((_norm(tower, "norm", tokens) @ tower["head.weight"].T + tower["head.bias"])[1:])
    return torch.stack(found)


def _replacing(state: State, config: VisionConfig, image: Tensor, chosen: list[int]) -> Tensor:
    patches = _patches(state, config, image)
    rows = [state["mask_token"][0, 0] if i in chosen else patches[i] for i in range(config.num_patches)]
    tokens = torch.cat([state["cls_token"][0], torch.stack(rows)]) + state["pos_embed"][0]
    return _norm(state, "norm", _blocks(state, "blocks", config, tokens, list(range(config.num_patches))))


def _dropping(state: State, config: VisionConfig, image: Tensor, chosen: list[int]) -> Tensor:
    every, position = list(range(config.num_patches)), state["pos_embed"][0]
    visible = [i for i in every if i not in chosen]
    patches = _patches(state, config, image)
    tokens = torch.cat([state["cls_token"][0] + position[:1], patches[visible] + position[1:][visible]])
    seen = _norm(state, "norm", _blocks(state, "blocks", config, tokens, visible))
    rows = [state["mask_token"][0, 0] + position[1 + i] if i in chosen else seen[1 + visible.index(i)] for i in every]
    tokens = _blocks(state, "decoder_blocks", config, torch.stack([seen[0], *rows]), every)
    return _norm(state, "decoder_norm", tokens)


def _patches(state: State, config: VisionConfig, image: Tensor) -> Tensor:
    weight, side = state["patch_embed.proj.weight"], config.patch_size
    rows, columns = config.grid
    found = []
    for row in range(rows):
        for column in range(columns):
            pixels = image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            found.append((weight * pixels).sum((1, 2, 3)) + state["patch_embed.proj.bias"])
    return torch.stack(found)


def _blocks(state: State, prefix: str, config: VisionConfig, x: Tensor, patches: list[int]) -> Tensor:
    """Tokens `[1 + n, width]`, the class token first, through all blocks; `patches` are the places of the others."""
    index = 0
    while f"{prefix}.{index}.norm1.weight" in state:
        name = f"{prefix}.{index}."
        block = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
        x = x + _attention(block, config, _norm(block, "norm1", x), patches)
        x = x + _swiglu(block, _norm(block, "norm2", x))
        index += 1
    return x


def _attention(state: State, config: VisionConfig, x: Tensor, patches: list[int]) -> Tensor:
    if "attn.qkv.weight" in state:
        q, k, v = (x @ state["attn.qkv.weight"].T).split(config.width, 1)
    else:
        q, k, v = (x @ state[f"attn.{name}_proj.weight"].T for name in "qkv")
    q, v = q + state["attn.q_bias"], v + state["attn.v_bias"]
    heads = []
    for head in range(config.heads):
        part = slice(head * config.head_dim, (head + 1) * config.head_dim)
        turned_q, turned_k = (_turned(each[:, part], config, patches) for each in (q, k))
        scores = (turned_q @ turned_k.T / config.head_dim**0.5).softmax(1)
        heads.append(scores @ v[:, part])
    out = torch.cat(heads, 1)
    if "attn.inner_attn_ln.weight" in state:
        out = _norm(state, "attn.inner_attn_ln", out)
    return out @ state["attn.proj.weight"].T + state["attn.proj.bias"]


def _turned(x: Tensor, config: VisionConfig, patches: list[int]) -> Tensor:
    """Pairs of channels as complex numbers, turned by the row in the first half and by the column in the second.

    The model's tables are float32.
    """
    (rows, columns), bands = config.grid, config.head_dim // 4
    frequencies = config.rope_theta ** (-torch.arange(bands, dtype=torch.float64) / bands) * config.pt_hw_seq_len
    angles = [torch.zeros(2 * bands, dtype=torch.float64)]
    angles += [torch.cat([p // columns / rows * frequencies, p % columns / columns * frequencies]) for p in patches]
    cos, sin = (function(torch.stack(angles)).float().double() for function in (torch.cos, torch.sin))
    numbers = torch.view_as_complex(x.reshape(len(x), -1, 2)) * torch.complex(cos, sin)
    return torch.view_as_real(numbers).flatten(1)


def _swiglu(state: State, x: Tensor) -> Tensor:
    gate, up = (x @ state[f"mlp.{name}.weight"].T + state[f"mlp.{name}.bias"] for name in ("w1", "w2"))
    hidden = gate * torch.sigmoid(gate) * up
    if "mlp.ffn_ln.weight" in state:
        hidden = _norm(state, "mlp.ffn_ln", hidden)
    return hidden @ state["mlp.w3.weight"].T + state["mlp.w3.bias"]


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]
        + state[f"{name}.bias"]
    )
