"""Whether what a model gave are numbers. Apart, as a search needs nothing else of an evaluation."""

from collections.abc import Sequence

from torch import Tensor

from evaclip.errors import UserError


def require_finite(values: Tensor, names: Sequence[object], what: str) -> None:
    """Raises UserError for what a model gave of pictures or texts, `[n, width]`, if it has NaN or infinity."""
    bad = (~values.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"the model gives NaN or infinity for {len(bad)} of {len(values)} {what}s, first for"
            f" {str(names[bad[0]])[:80]!r}: its weights are broken, or need precision fp32"
        )
