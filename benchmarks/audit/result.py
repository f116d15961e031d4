"""Counts of one call of an op, and the ratios that follow from them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

SECTOR = 32
"""Bytes of the smallest transfer of a GPU's memory."""
_STREAMED = 4
REST = "the rest"
"""Buffers unknown to the caller: statistics, and values between kernels."""


@dataclass(frozen=True)
class Traffic:
    """Requests of warps to a buffer in one direction.

    Attributes:
        requests: warp instructions.
        bytes: different bytes of each request, summed.
        sectors: different sectors of each request, summed.
        touched: different sectors of the whole launch.
    """

    requests: int = 0
    bytes: int = 0
    sectors: int = 0
    touched: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        mine, theirs = vars(self), vars(other)
        return Traffic(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class Shared:
    """Shared memory: requests of warps, their cycles, the least cycles without conflicts, and the worst conflict."""

    requests: int = 0
    cycles: int = 0
    least: int = 0
    worst: int = 0

    def __add__(self, other: "Shared") -> "Shared":
        sums = self.requests + other.requests, self.cycles + other.cycles, self.least + other.least
        return Shared(*sums, max(self.worst, other.worst))


@dataclass(frozen=True)
class Line:
    """A line of the source.

    Attributes:
        place: file and number.
        warps: warp instructions, by part of a multiprocessor.
        flops: multiplications and additions of matmuls.
        shared: shared memory.
        requests, sectors: global memory.
    """

    place: str
    warps: Mapping[str, int]
    flops: int
    shared: Shared
    requests: int
    sectors: int


@dataclass(frozen=True)
class Launch:
    """One kernel.

    Attributes:
        kernel: its name; nvcc's kernels as in `tests/cuda/budget.json` without the file.
        grid, block: sizes in x, y and z, on a simulated GPU of three multiprocessors.
        dynamic_bytes: dynamic shared memory of a block.
        barriers: barriers of a warp, on average.
        lines: lines of the source.
        loads, stores: global memory, by buffer.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_bytes: int
    barriers: float
    lines: tuple[Line, ...]
    loads: Mapping[str, Traffic]
    stores: Mapping[str, Traffic]

    @property
    def warps(self) -> Mapping[str, int]:
        """Warp instructions, by part of a multiprocessor."""
        total: Counter[str] = Counter()
        for line in self.lines:
            total.update(line.warps)
        return total

    @property
    def flops(self) -> int:
        """Multiplications and additions of matmuls."""
        return sum(line.flops for line in self.lines)

    @property
    def shared(self) -> Shared:
        """Shared memory of all lines."""
        return sum((line.shared for line in self.lines), Shared())

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

    @property
    def bytes_a_load(self) -> float:
        """Bytes of a warp's load from a large buffer; at most 512."""
        return self._bytes_a_request("loads")

    @property
    def bytes_a_store(self) -> float:
        """Bytes of a warp's store to a large buffer."""
        return self._bytes_a_request("stores")

    @property
    def worst_ways(self) -> int:
        """The worst conflict in the banks of shared memory; 1 is none, 0 no shared memory."""
        return max((launch.shared.worst for launch in self.launches), default=0)

    def _requests(self, large: bool, directions: tuple[str, ...] = ("loads", "stores")) -> list[Traffic]:
        """Requests to the large buffers, or to the others."""
        streamed = self.streamed
        return [
            traffic
            for launch in self.launches
            for direction in directions
            for name, traffic in getattr(launch, direction).items()
            if (name in streamed) == large
        ]

    def _bytes_a_request(self, direction: str) -> float:
        total = sum(self._requests(True, (direction,)), Traffic())
        return total.bytes / max(1, total.requests)
