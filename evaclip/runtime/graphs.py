"""A tower on a GPU whose kernels are launched by the GPU itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WARM_UP = 3
"""Calls before a capture, in which libraries allocate and choose what they keep."""


class _Captured(NamedTuple):
    graph: Any
    images: Tensor
    features: Tensor


class GraphedTower:
    """Calls `tower` by CUDA graphs, one for each size of batch, captured when that comes first.

    A block is some twenty kernels, and to launch them one by one takes the host longer than a small batch takes the
    GPU. Graphs of all sizes share one pool of memory, as one runs at a time.

    Args:
        tower: `[B, ...]` on the GPU to features `[B, dim]`; it asks nothing of the host, and its weights stay where
            they are.
    """

    def __init__(self, tower: Callable[[Tensor], Tensor]) -> None:
        self._tower = tower
        self._captured: dict[torch.Size, _Captured] = {}
        self._pool: Any = None

    def __call__(self, images: Tensor) -> Tensor:
        """Features, which no later call overwrites."""
        found = self._captured.get(images.shape) or self._capture(images)
        found.images.copy_(images)
        found.graph.replay()
        return found.features.clone()

    def _capture(self, images: Tensor) -> _Captured:
        held, device = images.clone(), images.device
        present, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        aside.wait_stream(present)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._tower(held)
        present.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # On a stream of the images' GPU: torch's own is of the current one.
        with torch.cuda.graph(graph, pool=self._pool, stream=aside):
            features = self._tower(held)
        self._pool = graph.pool()
        self._captured[images.shape] = _Captured(graph, held, features)
        return self._captured[images.shape]
