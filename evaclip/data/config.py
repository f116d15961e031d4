"""The section `data` of a training configuration."""

from typing import Annotated, Literal, Self

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
class MixtureItem:
    """One data set of a mixture; other keys are common to the mixture."""

    train: str
    """As `DataConfig.train`."""
    weight: Annotated[float, Field(gt=0)]
    """Share of the samples, over the sum of all weights; at least 1 in 1,000."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class RemoteConfig:
    """Fetching of remote shards into local copies."""

    cache_folder: str | None = None
    """Folder of the copies; None: evaclip/shards in $XDG_CACHE_HOME, else in ~/.cache."""
    cache_gb: Annotated[float, Field(gt=0)] = 32.0
    """Maximum size of a machine's copies, in 10^9 bytes; twice the shards of a shuffle window are enough."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a byte after which a fetch fails."""
    attempts: Count = 5
    """Least fetches of a shard, with growing pauses, before opening fails or its samples are replaced."""
    patience: Annotated[float, Field(ge=0)] = 1800.0
    """Seconds for which reading waits for an unreachable shard before its samples are replaced."""


@dataclass(frozen=True, kw_only=True, config=_STRICT_KEYS)
class DataConfig:
    """Source of the samples, order and decoding."""

    train: str = "synthetic"
    """Tar shards (paths, URLs or 'pipe:COMMAND', with braces, '::' between several; or a list that `evaclip data index`
    wrote), a table (.csv, .tsv, .jsonl, .ndjson, .parquet), a folder, or 'synthetic'."""
    mixture: dict[str, MixtureItem] = Field(default_factory=dict)
    """Data sets by name, mixed sample by sample in these proportions; `train` must be empty then."""
    kind: Kind = "auto"
    """Kind of `train`; auto: by the path."""
    image_key: str | None = None
    """webdataset: member suffixes by preference ('jpg;png'); tables: the column of image paths."""
    caption_key: str | None = None
    """webdataset: 'txt' or 'json:FIELD', by preference ('txt;json:caption'); tables: the column of captions."""
    csv_separator: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """None: tab, comma, semicolon or pipe, whichever gives the two columns."""
    caption_template: str = DEFAULT_TEMPLATE
    """folder: the caption, where {} is the class name."""
    num_samples: Count = 4096
    """synthetic: number of samples."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes per rank that read and decode; 0: the rank itself does."""
    prefetch: Count = 2
    """Batches ready in advance, over all workers; if they are small, per worker."""
    shuffle_window: Annotated[int, Field(ge=0)] = DEFAULT_WINDOW
    """Samples of the shuffled shards that are shuffled with each other; 0: all."""
    canonical_nodes: Count = 1
    """Groups of shards, best one per machine, so that a machine fetches only the shards of its group. It decides the
    order of samples, so don't change it when a run resumes on other machines."""
    remote: RemoteConfig = RemoteConfig()
    """Fetching of shards that are not local files."""
    exif_orientation: bool = False
    """Rotate images by their EXIF data; the released models were trained without."""
    min_size: Annotated[int, Field(ge=0)] = 0
    """Minimum pixels of the shorter side; samples with smaller images are replaced, like bad samples."""
    max_image_pixels: Count = DEFAULT_MAX_IMAGE_PIXELS
    """Maximum width times height; samples with larger images are replaced, like bad samples."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = DEFAULT_MAX_BAD_SHARE
    """Share of bad samples above which training stops and an evaluation set isn't measured; 1: no limit."""
    jpeg_reduction: bool = False
    """Decode large JPEGs at 1/2, 1/4 or 1/8, never below twice the model's image size: faster, not bit-equal."""
    resize: Literal["native"] | None = None
    """native: keep each image's aspect ratio (task.name=contrastive); None: resize to the model's image size."""
    max_patches: Count | None = None
    """native: maximum patches of an image; None: as many as the model's image size has."""
    augmentation: Augmentation = Augmentation()
    """Random augmentation of training images."""
    transform: str = "evaclip.transforms:TrainTransform"
    """MODULE:NAME of a transform class for training images. It is called with size, `Preprocess` and augmentation; its
    result maps a PIL image and a seed to float32 [3, height, width], or to uint8, which the device normalises."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.mixture and self.train:
            raise ValueError(f"mixture names the data sets, so train must be '', got train={self.train!r}")
        if self.max_patches is not None and self.resize is None:
            raise ValueError(f"max_patches={self.max_patches} needs resize=native")
        if "{}" not in self.caption_template:
            raise ValueError(f"caption_template must contain '{{}}', got {self.caption_template!r}")
        return self
