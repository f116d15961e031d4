"""Token dropout as a module, at the entrance of a vision tower."""

from torch import Tensor, nn

from ..ops import sample_token_index, token_dropout


class PatchDropout(nn.Module):
    """Drops the share `rate` of every sample's patches in training; keeps all in evaluation (Li et al. 2022).

    The kept tokens aren't rescaled and stay in the order of the grid.

    Args:
        rate: 0 <= rate < 1.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"PatchDropout: rate must be from 0 to below 1, got {rate}")
        self.rate = rate

    def num_kept(self, num_patches: int) -> int:
        """How many of `num_patches` are kept in training: at least 1."""
        return max(1, int(num_patches * (1 - self.rate)))

    def forward(
        self, patches: Tensor, *, prefix: Tensor | None = None, pos_embed: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Adds position embeddings, prepends the prefix and drops patches, never prefix tokens.

        Args:
            patches: `[B, N, C]`.
            prefix: `[P, C]`, class token and registers.
            pos_embed: `[P + N, C]`, the prefix's rows first.

        Returns:
            Tokens `[B, P + K, C]`, and the indices `[B, K]` of the kept patches for `rope_attention`, or None for all,
            drawn from the default generator of the device.
        """
        token_index = None
        if self.training and self.rate > 0:
            batch, num_patches, _ = patches.shape
            count = self.num_kept(num_patches)
            token_index = sample_token_index(batch, num_patches, count, device=patches.device)
        return token_dropout(patches, token_index, prefix=prefix, pos_embed=pos_embed), token_index

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
