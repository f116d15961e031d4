"""Masked image modelling once more, from a state dict and the papers' equations alone, in plain PyTorch.

EVA (arXiv 2211.07636, section 2): block-wise masked patches become a learned token, the loss is the negative cosine of
a linear layer behind the last norm and the CLIP features of the masked patches. EVA-02 (arXiv 2303.11331, section 2):
SwiGLU, a norm inside the MLP, two-dimensional rotary positions, Xavier's start values, no norm inside attention.
Masked autoencoders (arXiv 2111.06377, section 3): the encoder sees the visible patches alone.
"""

import torch
import torch.nn.functional as F
from plain_vision import plain_angles, plain_blocks, plain_norm, plain_patches, plain_tokens


def plain_loss(student, config, images, masked, features):
    """Mean over all masked patches `masked` [B, K] of the batch; `features` [B, patches, width] are the teacher's."""
    rows = torch.arange(len(images))[:, None]
    tokens = (_dropping if "decoder_norm.weight" in student else _replacing)(student, config, images, masked)
    predicted = F.linear(tokens[:, 1:][rows, masked], student["lm_head.weight"], student["lm_head.bias"])
    wanted = features[rows, masked]
    return -((predicted * wanted).sum(-1) / (predicted.norm(dim=-1) * wanted.norm(dim=-1))).mean()


def plain_features(tower, config, images):
    """Each patch of a CLIP's image tower, behind the last norm and the projection, `[B, patches, embed_dim]`."""
    tokens = plain_tokens(tower, plain_patches(tower, config, images))
    tokens = plain_norm(tower, "norm", config, plain_blocks(tower, config, tokens, _angles(config, images)))
    return F.linear(tokens, tower["head.weight"], tower["head.bias"])[:, 1:]


def _angles(config, images):
    return plain_angles(config).expand(len(images), -1, -1)


def _replacing(state, config, images, masked):
    patches = plain_patches(state, config, images)
    is_masked = torch.zeros(patches.shape[:2], dtype=torch.bool).scatter(1, masked, True)
    tokens = plain_tokens(state, torch.where(is_masked[..., None], state["mask_token"], patches))
    return plain_norm(state, "norm", config, plain_blocks(state, config, tokens, _angles(config, images)))


def _dropping(state, config, images, masked):
    rows, angles = torch.arange(len(images))[:, None], _angles(config, images)
    visible = torch.stack([torch.tensor([i for i in range(config.num_patches) if i not in m]) for m in masked.tolist()])
    tokens = plain_tokens(state, plain_patches(state, config, images))
    tokens = torch.cat([tokens[:, :1], tokens[:, 1:][rows, visible]], 1)
    seen = plain_norm(state, "norm", config, plain_blocks(state, config, tokens, angles[rows, visible]))
    every = (state["mask_token"] + state["pos_embed"][:, 1:]).expand(len(images), -1, -1)
    every = torch.cat([seen[:, :1], every.index_put((rows, visible), seen[:, 1:])], 1)
    return plain_norm(state, "decoder_norm", config, plain_blocks(state, config, every, angles, "decoder_blocks"))
