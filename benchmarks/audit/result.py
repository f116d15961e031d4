"""What was counted of one call of an op, and what it comes to."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SECTOR = 32
"""Bytes of the least piece of memory that a GPU moves."""
_STREAMED = 4
REST = "the rest"
"""Buffers that the caller doesn't know: statistics, and what kernels keep in between."""


@dataclass(frozen=True)
class Traffic:
    """What warps asked of a buffer in one direction.

    Attributes:
        requests: instructions of a warp.
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
    """Shared memory: requests of warps, cycles they take, the least without conflicts, and the most that any part of a
    request took in place of one."""

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
        warps: instructions of warps, by pipe.
        flops: of products of matrices.
        shared: memory.
        requests, sectors: of global memory.
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
        kernel: its name; of nvcc's kernels as `tests/cuda/budget.json` has it but for the file.
        grid, block: sizes in x, y and z. The stand-in for the CUDA runtime plays a GPU of three multiprocessors.
        dynamic_bytes: of shared memory that a block asks for at its launch.
        barriers: of a warp, on average.
        lines: of the source, with all that follows by line.
        loads, stores: of global memory, by buffer.
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
    def threads_of_block(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def warps(self) -> Mapping[str, int]:
        """Instructions of warps, by pipe."""
        total: Counter[str] = Counter()
        for line in self.lines:
            total.update(line.warps)
        return total

    @property
    def flops(self) -> int:
        """Of products of matrices."""
        return sum(line.flops for line in self.lines)

    @property
    def shared(self) -> Shared:
        """Memory, of all lines."""
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
        arch: the architecture whose PTX it is, such as sm_80.
        op, shape, dtype: names.
        direction: forward or backward.
        floor: bytes by formula: each input read once, each output written once.
        sizes: bytes of the buffers that the caller knows.
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
        """The large buffers: too large for a cache at the sizes of models. The others belong to channels or rows."""
        least = max(self.sizes.values()) / _STREAMED
        return frozenset(name for name, size in self.sizes.items() if size >= least)

    @property
    def traffic(self) -> float:
        """Sectors over the floor: of large buffers those of every request, of the others each once a kernel.

        A weight is read for each row, but from memory only once.
        """
        large = sum(traffic.sectors for traffic in self._of(self.streamed))
        small = sum(traffic.touched for traffic in self._of(self._small))
        return SECTOR * (large + small) / self.floor

    @property
    def touched(self) -> float:
        """Different sectors of each kernel over the floor: the traffic if caches were perfect."""
        return sum(launch.touched for launch in self.launches) / self.floor

    @property
    def cached(self) -> float:
        """Sectors over the floor that small buffers are asked for again: by the caches' bandwidth."""
        return SECTOR * sum(traffic.sectors - traffic.touched for traffic in self._of(self._small)) / self.floor

    @property
    def bytes_a_load(self) -> float:
        """Bytes that a warp gets by a load from a large buffer; 512 is the most."""
        return self._bytes_a_request("loads")

    @property
    def bytes_a_store(self) -> float:
        """Bytes that a warp puts by a store to a large buffer."""
        return self._bytes_a_request("stores")

    @property
    def worst_ways(self) -> int:
        """The worst conflict in the banks of shared memory; 1 is none, 0 no shared memory."""
        return max((launch.shared.worst for launch in self.launches), default=0)

    @property
    def _small(self) -> frozenset[str]:
        return frozenset({*self.sizes, REST}) - self.streamed

    def _of(self, names: Iterable[str], directions: tuple[str, ...] = ("loads", "stores")) -> list[Traffic]:
        wanted = set(names)
        return [
            traffic
            for launch in self.launches
            for direction in directions
            for name, traffic in getattr(launch, direction).items()
            if name in wanted
        ]

    def _bytes_a_request(self, direction: str) -> float:
        total = sum(self._of(self.streamed, (direction,)), Traffic())
        return total.bytes / max(1, total.requests)
