"""Block-wise masks of patches: what masked image modelling hides (BEiT, Bao et al. 2021, arXiv 2106.08254)."""

import math
from dataclasses import dataclass
from random import Random

import numpy as np

from evaclip.data.order import I64
from evaclip.errors import UserError

_ATTEMPTS = 10


@dataclass(frozen=True)
class BlockMasks:
    """Draws rectangles of patches at random until a share of the grid is masked.

    A rectangle's area is uniform between `smallest` and the number of patches left to mask. Its aspect ratio is
    log-uniform between `narrowest` and the inverse. It may overlap others. BEiT, EVA and EVA-02 give up after ten
    attempts in a row, up to a few patches short. Here smaller rectangles then make up the number, so that all samples
    weigh the same.

    Args:
        grid: rows and columns of patches, two of each at least.
        ratio: share of the patches that is masked, rounded to whole patches.
        smallest: patches of the smallest rectangle, while there is room.
        narrowest: height / width of the flattest rectangle.

    Raises:
        UserError: the grid is too small, or no patch would be masked, or all.
    """

    grid: tuple[int, int]
    ratio: float = 0.4
    smallest: int = 16
    narrowest: float = 0.3

    def __post_init__(self) -> None:
        if min(self.grid) < 2 or not 0 < self.count < math.prod(self.grid):
            raise UserError(
                f"a mask of {self.ratio:g} of {self.grid[0]} x {self.grid[1]} patches is {self.count} of them; expected"
                " two rows and columns at least, some patches masked and some not"
            )

    @property
    def count(self) -> int:
        """Patches that are masked."""
        return round(self.ratio * math.prod(self.grid))

    def __call__(self, seed: int) -> I64:
        """Numbers of the masked patches, row by row, int64 `[count]`, ascending; a pure function of `seed`."""
        uniform = Random(seed).random  # Python guarantees this generator's numbers
        masked = np.zeros(self.grid, dtype=bool)
        left, smallest = self.count, self.smallest
        while left:
            for _ in range(_ATTEMPTS):
                block = self._block(smallest, left, uniform(), uniform())
                if block is None:
                    continue
                (height, width), (rows, columns) = block, self.grid
                top, first = int(uniform() * (rows - height + 1)), int(uniform() * (columns - width + 1))
                part = masked[top : top + height, first : first + width]
                added = height * width - int(np.count_nonzero(part))
                if 0 < added <= left:
                    part[:] = True
                    left -= added
                    break
            else:
                smallest = 1
        return np.flatnonzero(masked)

    def _block(self, smallest: int, left: int, size: float, shape: float) -> tuple[int, int] | None:
        """Height and width of a rectangle, by two numbers in [0, 1); None for one that isn't smaller than the grid."""
        area = smallest + (left - smallest) * size
        aspect = self.narrowest ** (1 - 2 * shape)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        return (height, width) if height < self.grid[0] and width < self.grid[1] else None
