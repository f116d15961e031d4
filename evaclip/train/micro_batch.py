"""Micro-batches of a step: their rows, targets and images on the device, and the context in which a task runs them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaclip.data.loader import Batch
from evaclip.packing import PackedImages
from evaclip.transforms import Normalization


@dataclass(frozen=True)
class MicroBatch:
    """Rows that pass through the model together.

    Attributes:
        rows: range of this rank's rows.
        targets: their targets, in host memory as the loader returned them.
        token_index: int64 [rows, kept], patches that patch dropout keeps, on the device; None keeps all.
        step: index of the step, from 0.
        first_row: index of the first of these rows in the global batch.
    """

    rows: slice
    targets: Tensor
    token_index: Tensor | None
    step: int
    first_row: int


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """Everything that a task needs to run the micro-batches of one step.

    Attributes:
        micro_batches: this rank's rows, in order.
        batch: this rank's rows, in host memory.
        upload: copies the images of micro-batches to the device and normalises them, see `upload`.
        device: that computes.
        measure: whether metrics are wanted besides the loss.
        autocast_dtype: None for no autocast.
        loss_scale: 0-D factor of the loss, 1 except under amp_fp16.
        share: factor of a sum over rows that makes its mean over ranks the mean over the global batch.
        begin_backward: called before the backward pass of each micro-batch with whether it is the last.
    """

    micro_batches: Sequence[MicroBatch]
    batch: Batch
    upload: Callable[[Iterable[Batch]], Iterator[Any]]
    device: torch.device
    measure: bool
    autocast_dtype: torch.dtype | None
    loss_scale: Tensor
    share: float
    begin_backward: Callable[[bool], None]

    def images(self, rounds: int = 1) -> Iterator[Any]:
        """Images of each micro-batch, on the device and normalised; `rounds` times.

        float32 [rows, 3, height, width], or packed as the loader returned them.

        Call `next` in the expression that uses the images: holding them costs memory while the next ones are copied.
        """
        return self.upload(self.batch[each.rows] for each in [*self.micro_batches] * rounds)

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast of one forward pass: its cache would carry casts without a graph over into the next pass."""
        dtype = self.autocast_dtype
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()

    def begin(self, micro_batch: MicroBatch) -> None:
        """Call it before the backward pass of each micro-batch, in their order."""
        self.begin_backward(micro_batch is self.micro_batches[-1])

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on."""
        return loss * self.loss_scale

    def mean_of(self, values: Tensor) -> Tensor:
        """The contribution of these rows to a mean over the global batch.

        Sum it over micro-batches and average it over ranks, which may have unequal numbers of rows.
        """
        return values.sum() * self.share


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, through pinned memory: other copies wait for the device's work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def upload(
    batches: Iterable[Batch],
    device: torch.device,
    stream: torch.cuda.Stream | None,
    normalize: Normalization,
) -> Iterator[Any]:
    """Copies images of batches to the device, each while the ones before are computed, and yields them normalised.

    On a GPU, copies use their own stream, and the host doesn't wait if the memory is pinned.

    Args:
        batches: in host memory or on the device.
        device: that computes.
        stream: of the copies; None copies in the current stream.
        normalize: uint8 to float32.
    """
    waiting = iter(batches)

    def begin_copy() -> Any:
        batch = next(waiting, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):  # does nothing without a stream
            return batch.images_on(device, non_blocking=True)

    copy = begin_copy()
    while copy is not None:
        if stream is not None:
            present = torch.cuda.current_stream(device)
            present.wait_stream(stream)
            # The copy stream may reuse the memory only after the computation.
            for tensor in copy.tensors() if isinstance(copy, PackedImages) else (copy,):
                tensor.record_stream(present)
        pixels = [normalize(copy)]
        del copy
        copy = begin_copy()
        yield pixels.pop()  # so that no reference stays here
