"""The data part of a training configuration."""

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from evaclip.augmentation import Augmentation
from evaclip.data import Kind
from evaclip.pixels import DEFAULT_MAX_IMAGE_PIXELS

Count = Annotated[int, Field(gt=0)]

DEFAULT_WINDOW = 100_000
DEFAULT_TEMPLATE = "a photo of a {}"
DEFAULT_MAX_BAD_SHARE = 0.1
_STRICT_KEYS = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class PartConfig:
    """One data set of a mixture; the other keys are those of the whole."""

    train: str
    """As `DataConfig.train`."""
    weight: Annotated[float, Field(gt=0)]
    """Share of the samples, over the sum of all weights; at least 1 in 1,000."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class RemoteConfig:
    """How remote shards are fetched; they are read from local copies."""

    cache_folder: str | None = None
    """Where the copies lie; None: evaclip/shards in $XDG_CACHE_HOME, else in ~/.cache."""
    cache_gb: Annotated[float, Field(gt=0)] = 32.0
    """What the copies of a machine may take, in 10^9 bytes; twice the shards of a shuffle window are enough."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a byte after which a try to fetch a shard fails."""
    attempts: Count = 5
    """Tries to fetch a shard, with longer and longer pauses between them, before its samples are replaced."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class DataConfig:
    """Where samples come from and how they are read."""

    train: str = "synthetic"
    """Tar shards (paths, URLs or 'pipe:COMMAND', with braces, '::' between several; or a list that `evaclip data index`
    wrote), a table (.csv, .tsv, .jsonl, .ndjson, .parquet), a folder, or 'synthetic'."""
    mixture: dict[str, PartConfig] = Field(default_factory=dict)
    """Data sets by name, mixed sample by sample in these proportions; `train` must be empty then."""
    kind: Kind = "auto"
    """What `train` is; auto looks at the path."""
    image_key: str | None = None
    """webdataset: member suffixes by preference ('jpg;png'); tables: the column of picture paths."""
    caption_key: str | None = None
    """webdataset: 'txt' or 'json:FIELD', by preference ('txt;json:caption'); tables: the column of captions."""
    csv_separator: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """None: tab, comma, semicolon or pipe, whichever gives the two columns."""
    caption_template: str = DEFAULT_TEMPLATE
    """folder: the caption, where {} is the class name."""
    num_samples: Count = 4096
    """synthetic: how many samples there are."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that read and decode, per training process; 0 does it in the training process."""
    prefetch: Count = 2
    """Batches that wait ready, over all workers; of small ones as many a worker."""
    shuffle_window: Annotated[int, Field(ge=0)] = DEFAULT_WINDOW
    """Samples of the shuffled shards that are mixed with one another; 0 mixes all."""
    canonical_nodes: Count = 1
    """Parts that the shards are divided among, best one a machine, so that each fetches its own shards only; windows
    are of each part. It changes the order of samples, so it stays as it is when a run goes on elsewhere."""
    remote: RemoteConfig = RemoteConfig()
    """Of shards that are not local files."""
    exif_orientation: bool = False
    """Turn pictures as their EXIF data says; not done in the training of the released models."""
    min_size: Annotated[int, Field(ge=0)] = 0
    """Pixels of the shorter side; samples with smaller pictures are replaced, as bad ones are."""
    max_image_pixels: Count = DEFAULT_MAX_IMAGE_PIXELS
    """Width times height that an image may have; samples with larger images are replaced, as bad ones are."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = DEFAULT_MAX_BAD_SHARE
    """Share of bad samples above which a training ends with an error, and an evaluation set isn't measured; 1 sets no
    limit."""
    jpeg_reduction: bool = False
    """Decode large JPEGs at 1/2, 1/4 or 1/8, never below twice the model's picture size: faster, inexact."""
    augmentation: Augmentation = Augmentation()
    """What happens to training pictures at random."""
    transform: str = "evaclip.transforms:TrainTransform"
    """MODULE:NAME of what makes tensors of training pictures, your own too: called with the size, the `Preprocess` and
    the augmentation, it gives a function of a PIL image and a seed that returns float32 [3, height, width], or
    uint8 to be normalised on the device."""

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.mixture and self.train:
            raise ValueError(f"mixture names the data sets, so train must be '', got train={self.train!r}")
        return self

    @model_validator(mode="after")
    def _template_has_a_place(self) -> Self:
        if "{}" not in self.caption_template:
            raise ValueError(f"caption_template must contain '{{}}', got {self.caption_template!r}")
        return self
