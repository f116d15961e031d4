"""From the host's memory to the device, without either waiting for the other."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from evaclip.data.loader import Rows
from evaclip.transforms import Normalization


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. By way of pinned memory, as from any other the host waits for the device's work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Upload:
    """An iterator over chunks of pictures that copies each to the device while the one before is computed.

    On a GPU copies have a stream of their own, and the host goes on if the memory is pinned.

    Args:
        images: uint8 or float32 [b, 3, height, width] each, in host memory or on the device.
        device: that computes.
        stream: for the copies; None copies in line with the computation.
        normalize: gives float32 of uint8.
    """

    def __init__(
        self,
        images: Iterable[Tensor | Rows],
        device: torch.device,
        stream: torch.cuda.Stream | None,
        normalize: Normalization,
    ) -> None:
        self._images = iter(images)
        self._device = device
        self._stream = stream
        self._normalize = normalize
        self._copy = self._start()

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        # Nothing of a chunk is held here once it was handed out.
        copy, self._copy = self._copy, None
        if copy is None:
            raise StopIteration
        if self._stream is not None:
            present = torch.cuda.current_stream(self._device)
            present.wait_stream(self._stream)
            # Its memory is the copies' to use again only after the computation.
            copy.record_stream(present)
        pixels = self._normalize(copy)
        del copy
        self._copy = self._start()
        return pixels

    def _start(self) -> Tensor | None:
        images = next(self._images, None)
        if images is None:
            return None
        # Does nothing without a stream.
        with torch.cuda.stream(self._stream):
            return images.to(self._device, non_blocking=True)
