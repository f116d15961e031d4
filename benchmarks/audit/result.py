"""What was counted of one call of an op, and what it comes to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
class Launch:
    """One kernel.

    Attributes:
        kernel: its name, as `csrc/cuda/budget.json` has it but for the file.
        grid, block: sizes in x, y and z. The emulator plays a GPU of three multiprocessors.
        dynamic_bytes: of shared memory that a block asks for at its launch.
        barriers: of one block, on average.
        shared_ways: how many words the busiest bank of shared memory gives for a request, on average; None without any.
        worst_ways: the most.
        loads, stores: of global memory, by buffer.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_bytes: int
    barriers: float
    shared_ways: float | None
    worst_ways: int
    loads: Mapping[str, Traffic]
    stores: Mapping[str, Traffic]

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.block[0] * self.block[1] * self.block[2]


@dataclass(frozen=True)
class Count:
    """One call of an op.

    Attributes:
        op, shape, dtype: names.
        direction: forward or backward.
        floor: bytes by formula: each input read once, each output written once.
        memory: bytes between memory and a cache of 1 MiB, as small as the GPU that is played, which the blocks that run
            at the same time share; written ones when they leave it.
        sizes: bytes of the buffers that the caller knows.
    """

    op: str
    shape: str
    dtype: str
    direction: str
    floor: float
    memory: int
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
        return SECTOR * sum(traffic.touched for traffic in self._of(self.streamed | self._small)) / self.floor

    @property
    def past_cache(self) -> float:
        """Bytes that a small cache doesn't keep over the floor."""
        return self.memory / self.floor

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
        return max(launch.worst_ways for launch in self.launches)

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


def count_from_json(stored: Mapping[str, Any]) -> Count:
    """What `dataclasses.asdict` made of a count."""
    launches = []
    for launch in stored["launches"]:
        buffers = {
            direction: {name: Traffic(**traffic) for name, traffic in launch[direction].items()}
            for direction in ("loads", "stores")
        }
        sizes = {name: tuple(launch[name]) for name in ("grid", "block")}
        launches.append(Launch(**{**launch, **buffers, **sizes}))
    return Count(**{**stored, "launches": tuple(launches)})
