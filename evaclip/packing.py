"""Images of several sizes in one batch: their patches after each other, without padding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedImages:
    """Patches of images of several sizes, packed without padding; `len()` is the number of images.

    Attributes:
        patches: `[T, 3 * patch * patch]`, pixels of each patch in the order (channel, y, x) of the convolution's
            weight: images after each other, patches row by row. uint8, or normalized floating-point.
        positions: int64 `[T, 2]`, y and x of each patch in its image's grid.
        sizes: int64 `[B, 2]`, rows and columns of each image's grid.
        lengths: int64 `[B]`, patches of each image: rows * columns, fewer after token dropout.
        max_length: the largest of `lengths`, or an upper bound.
    """

    patches: Tensor
    positions: Tensor
    sizes: Tensor
    lengths: Tensor
    max_length: int

    def __len__(self) -> int:
        return self.sizes.shape[0]

    def __getitem__(self, images: slice) -> Self:
        """Consecutive images, as views; waits for the device of `lengths`."""
        if not isinstance(images, slice) or images.step not in (None, 1):
            raise TypeError(
                f"images must be a slice with step 1, got {images!r}; `evaclip.pack_images` makes a batch of images"
            )
        lengths, before = self.lengths[images], int(self.lengths[: images.indices(len(self))[0]].sum())
        rows = slice(before, before + int(lengths.sum()))
        longest = int(lengths.max()) if len(lengths) else 0
        return type(self)(self.patches[rows], self.positions[rows], self.sizes[images], lengths, longest)

    @classmethod
    def concatenate(cls, pieces: Sequence[Self]) -> Self:
        """The images of all pieces, which are on one device."""
        patches, positions, sizes, lengths = map(torch.cat, zip(*(piece.tensors() for piece in pieces), strict=True))
        return cls(patches, positions, sizes, lengths, max(piece.max_length for piece in pieces))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The images with `function` applied to every tensor."""
        patches, positions, sizes, lengths = map(function, self.tensors())
        return type(self)(patches, positions, sizes, lengths, self.max_length)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> Self:
        """The images on `device`, the patches in `dtype`; None changes nothing."""
        images = self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking)) if device else self
        return images if dtype is None else replace(images, patches=images.patches.to(dtype))

    def pin_memory(self) -> Self:
        """The images in pinned memory; a `DataLoader` calls it."""
        return self.map(Tensor.pin_memory)

    def tensors(self) -> tuple[Tensor, ...]:
        """Patches, positions, sizes and lengths."""
        return self.patches, self.positions, self.sizes, self.lengths


def pack_images(images: Sequence[Tensor], patch: int) -> PackedImages:
    """Pack images `[3, height, width]` of any sizes and one dtype.

    Args:
        images: at least one; height and width are multiples of `patch`.
        patch: side of a patch in pixels.

    Raises:
        ValueError: for no images or another shape.

    Example:
        `model.encode_image(pack_images([transform(image) for image in images], patch=16))`
    """
    if not images:
        raise ValueError("images must hold at least one image, got none")
    patches, positions, sizes = [], [], []
    for image in images:
        if image.ndim != 3 or image.shape[0] != 3 or not all(side and side % patch == 0 for side in image.shape[1:]):
            raise ValueError(
                f"images must have shape [3, height, width] with multiples of {patch} pixels, got {tuple(image.shape)}"
            )
        grid = image.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).permute(1, 3, 0, 2, 4)
        rows, columns = grid.shape[:2]
        patches.append(grid.flatten(2).flatten(0, 1))
        positions.append(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)))
        sizes.append((rows, columns))
    lengths = [rows * columns for rows, columns in sizes]
    packed = PackedImages(
        torch.cat(patches), torch.cat(positions), torch.tensor(sizes), torch.tensor(lengths), max(lengths)
    )
    return packed.to(images[0].device)


def drop_patches(images: PackedImages, share: float, generator: torch.Generator | None = None) -> PackedImages:
    """Token dropout: each image keeps `max(1, int(n * (1 - share)))` of its n patches, drawn uniformly.

    Images draw one after the other, each as `evakernels.sample_token_index` does. Waits for the device of `images`,
    which is the generator's.
    """
    lengths, first, kept = [], 0, []
    for count in images.lengths.tolist():
        lengths.append(max(1, int(count * (1 - share))))
        keys = torch.rand(count, generator=generator, device=images.lengths.device)
        kept.append(first + keys.topk(lengths[-1], sorted=False).indices.sort().values)
        first += count
    rows = torch.cat(kept)
    return replace(
        images,
        patches=images.patches[rows],
        positions=images.positions[rows],
        lengths=images.lengths.new_tensor(lengths),
        max_length=max(lengths),
    )
