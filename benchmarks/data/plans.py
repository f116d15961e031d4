"""What is read: the command line knows it without what reads data."""

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
