"""FLOPs of a forward pass, from the configuration alone."""

from dataclasses import replace

from evaclip.model.config import CLIPConfig, Savings, TextConfig, VisionConfig

PLAIN = Savings(pack_text=False, pooled_last_block=False, early_drop=False)
"""No memory options: the cost that is usually quoted for a model."""


def flops_per_sample(
    config: CLIPConfig, token_keep: float = 1.0, savings: Savings = PLAIN, text_tokens: int | None = None
) -> int:
    """FLOPs of one image-text pair, forward, in matmuls and attention; 2 per MAC.

    A backward pass costs twice as much, except for the patch embedding, as images need no gradient.

    Args:
        config: the model's configuration.
        token_keep: share of the patches that patch dropout keeps.
        savings: memory options; see docs/scale.md for the effect of each.
        text_tokens: length of the caption with start and end token; None for the full context.
    """
    image = vision_flops(config.vision, config.image_projection, token_keep, savings)
    return image + text_flops(config.text, config.embed_dim, savings, text_tokens)


def vision_flops(config: VisionConfig, embed_dim: int, token_keep: float = 1.0, savings: Savings = PLAIN) -> int:
    """FLOPs of one image, forward."""
    kept = max(1, int(config.num_patches * token_keep))
    embedded = kept if savings.early_drop else config.num_patches
    embedding = embedded * config.width * 3 * config.patch_size**2
    mlp_matrices = 3 if config.mlp == "swiglu" else 2
    if config.pool != "token":
        savings = replace(savings, pooled_last_block=False)
    blocks = _block_macs(config, config.prefix_tokens + kept, mlp_matrices * config.hidden, savings)
    head = config.width * embed_dim
    if config.pool == "attention":
        head += config.width * ((2 * kept + 1) * config.width + 2 * kept + 2 * config.hidden)
    return 2 * (embedding + blocks + head)


def masked_image_flops(config: VisionConfig, features: int, masked: int, decoder_layers: int = 0) -> int:
    """FLOPs of one image in masked image modelling, forward, without the teacher.

    Args:
        features: width of the predictions.
        masked: number of masked patches.
        decoder_layers: further blocks that see all patches; the others then see only visible ones.
    """
    patches, mlp_columns = config.num_patches, (3 if config.mlp == "swiglu" else 2) * config.hidden
    visible = patches - masked if decoder_layers else patches
    blocks = _block_macs(config, 1 + visible, mlp_columns, PLAIN)
    if decoder_layers:
        blocks += _block_macs(replace(config, layers=decoder_layers), 1 + patches, mlp_columns, PLAIN)
    return 2 * (visible * config.width * 3 * config.patch_size**2 + blocks + masked * config.width * features)


def text_flops(config: TextConfig, embed_dim: int, savings: Savings = PLAIN, text_tokens: int | None = None) -> int:
    """FLOPs of one text, forward; `text_tokens` matters for packed texts."""
    tokens = config.context_length
    if savings.pack_text and config.causal and text_tokens is not None:
        tokens = text_tokens
    return 2 * (_block_macs(config, tokens, 2 * config.hidden, savings) + config.width * embed_dim)


def _block_macs(config: VisionConfig | TextConfig, tokens: int, mlp_columns: int, savings: Savings) -> int:
    """MACs of all blocks of a tower. A pooled last block needs keys and values of all tokens, the rest of one."""
    width, layers = config.width, config.layers
    keys_and_values = 2 * tokens * width**2
    per_query = 2 * width**2 + 2 * tokens * width + width * mlp_columns
    queries = (layers - 1) * tokens + 1 if savings.pooled_last_block else layers * tokens
    return layers * keys_and_values + queries * per_query
