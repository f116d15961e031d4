"""What is read and what is mixed: the command line knows it without what reads data."""

from dataclasses import dataclass

from evaclip.errors import UserError


@dataclass(frozen=True)
class RatePlan:
    """What is read.

    Attributes:
        shards, per_shard: the data set.
        image_bytes: of each image member; random bytes, so that nothing is decoded.
        window: samples that are mixed, and the size of webdataset's shuffle buffer.
        passes: over the data and all readers in turn; the median counts.
    """

    shards: int = 8
    per_shard: int = 500
    image_bytes: int = 40_000
    window: int = 2_000
    passes: int = 3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class ShufflePlan:
    """A data set and its batches.

    Attributes:
        windows: in samples; 0 is the whole data set.
        buffers: of webdataset's shuffle, in samples.
        nodes: canonical nodes of one more row, whose windows are each `windows[-1]` over `nodes`.
    """

    shards: int = 200
    per_shard: int = 1_000
    batch: int = 4_000
    windows: tuple[int, ...] = (0, 100_000, 20_000, 5_000)
    buffers: tuple[int, ...] = (100_000, 20_000, 5_000)
    nodes: int = 8


@dataclass(frozen=True)
class MachinesPlan:
    """A recipe's batches on many machines, all numbers of samples divided by `scale`: those of shards stay as they are.

    Attributes:
        shards, per_shard: the data set; 10,000 samples a shard in full size.
        batch: samples, over all machines.
        gpus: of each machine.
        workers: of each GPU.
    """

    recipe: str = "eva02-b-16"
    scale: int = 16
    shards: int = 2_048
    per_shard: int = 625
    batch: int = 8_192
    machines: int = 8
    gpus: int = 8
    workers: int = 8
