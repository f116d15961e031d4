"""Counts of one call of an op, and the ratios that follow from them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ptx_interpreter import Traffic
from ptx_interpreter.traffic import SECTOR, Requests

_STREAMED = 4
REST = "the rest"
"""Buffers unknown to the caller: statistics, and values between kernels."""


def add_up(several: Iterable[Requests]) -> Requests:
    """Return the sums of several requests."""
    return Requests(*map(sum, zip(*several, strict=True)))


@dataclass
class Line:
    """A line of the source.

    Attributes:
        place: file and number.
        warps: warp instructions, by pipe.
        flops: multiplications and additions of matmuls.
        memory, shared: requests to global and to shared memory.
    """

    place: str
    warps: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    memory: Traffic = field(default_factory=Traffic)
    shared: Traffic = field(default_factory=Traffic)


@dataclass(frozen=True)
class Launch:
    """One kernel.

    Attributes:
        kernel: its name; nvcc's kernels as in `tests/cuda/budget.json` without the file.
        barriers: barriers of a warp, on average.
        lines: lines of the source.
        loads, stores: global memory, by buffer.
    """

    kernel: str
    barriers: float
    lines: tuple[Line, ...]
    loads: Mapping[str, Requests]
    stores: Mapping[str, Requests]

    @property
    def total(self) -> Line:
        """All lines together."""
        total = Line(self.kernel)
        for line in self.lines:
            total.warps.update(line.warps)
            total.flops += line.flops
            total.memory.add(line.memory)
            total.shared.add(line.shared)
        return total

    @property
    def touched(self) -> int:
        """Bytes of all different sectors that are loaded, and of all that are stored."""
        return SECTOR * sum(traffic.touched for traffic in [*self.loads.values(), *self.stores.values()])


@dataclass(frozen=True)
class Count:
    """One call of an op.

    Attributes:
        kernels: `cuda` or `triton`.
        arch: architecture of the PTX, such as sm_80.
        op, shape, dtype: names.
        direction: forward or backward.
        floor: bytes by formula: each input read once, each output written once.
        sizes: bytes of the caller's buffers.
    """

    kernels: str
    arch: str
    op: str
    shape: str
    dtype: str
    direction: str
    floor: float
    sizes: Mapping[str, int]
    launches: tuple[Launch, ...]

    @property
    def streamed(self) -> frozenset[str]:
        """The buffers that exceed a cache at the sizes of models. The others have values per channel or row."""
        least = max(self.sizes.values()) / _STREAMED
        return frozenset(name for name, size in self.sizes.items() if size >= least)

    @property
    def traffic(self) -> float:
        """Sectors over the floor: every request to large buffers; small ones, which stay in a cache, once a kernel."""
        large = sum(traffic.sectors for traffic in self._requests(large=True))
        small = sum(traffic.touched for traffic in self._requests(large=False))
        return SECTOR * (large + small) / self.floor

    @property
    def touched(self) -> float:
        """Different sectors of each kernel over the floor: the traffic with perfect caches."""
        return sum(launch.touched for launch in self.launches) / self.floor

    @property
    def cached(self) -> float:
        """Repeated sectors of small buffers over the floor, which caches serve."""
        repeated = sum(traffic.sectors - traffic.touched for traffic in self._requests(large=False))
        return SECTOR * repeated / self.floor

    def request_bytes(self, direction: str) -> float:
        """Bytes of a warp's request to a large buffer, at most 512; `direction` is `loads` or `stores`."""
        total = add_up(self._requests(True, (direction,)))
        return total.bytes / max(1, total.requests)

    @property
    def worst_ways(self) -> int:
        """The worst conflict in the banks of shared memory; 1 is none, 0 no shared memory."""
        return max((launch.total.shared.worst for launch in self.launches), default=0)

    def _requests(self, large: bool, directions: tuple[str, ...] = ("loads", "stores")) -> list[Requests]:
        """Requests to the large buffers, or to the others."""
        streamed = self.streamed
        return [
            traffic
            for launch in self.launches
            for direction in directions
            for name, traffic in getattr(launch, direction).items()
            if (name in streamed) == large
        ]
