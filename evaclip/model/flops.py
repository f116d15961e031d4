"""What a forward pass costs, from the configuration alone."""

from evaclip.model.config import CLIPConfig, TextConfig, VisionConfig


def flops_per_sample(config: CLIPConfig, token_keep: float = 1.0) -> int:
    """Floating-point operations of one image-text pair, forward, in matrix products and attention; 2 per MAC.

    A backward pass costs twice as much again. The text counts with its full context length.

    Args:
        config: of the model.
        token_keep: share of the patches that patch dropout keeps.
    """
    return vision_flops(config.vision, config.embed_dim, token_keep) + text_flops(config.text, config.embed_dim)


def vision_flops(config: VisionConfig, embed_dim: int, token_keep: float = 1.0) -> int:
    """Floating-point operations of one image; all patches are embedded, the blocks see those kept."""
    tokens = 1 + max(1, int(config.num_patches * token_keep))
    embedding = config.num_patches * config.width * 3 * config.patch_size**2
    mlp_matrices = 3 if config.mlp == "swiglu" else 2
    block = _block_macs(tokens, config.width, mlp_matrices * config.hidden)
    return 2 * (embedding + config.layers * block + config.width * embed_dim)


def text_flops(config: TextConfig, embed_dim: int) -> int:
    """Floating-point operations of one text."""
    block = _block_macs(config.context_length, config.width, 2 * config.hidden)
    return 2 * (config.layers * block + config.width * embed_dim)


def _block_macs(tokens: int, width: int, mlp_columns: int) -> int:
    projections = 4 * tokens * width**2
    scores_and_values = 2 * tokens**2 * width
    return projections + scores_and_values + tokens * width * mlp_columns
