"""The kinds of data."""

from typing import Literal, get_args

Kind = Literal["auto", "webdataset", "csv", "jsonl", "parquet", "folder", "synthetic"]
KINDS: tuple[str, ...] = get_args(Kind)
