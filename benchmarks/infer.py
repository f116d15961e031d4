"""Embeddings by engine: this library, PyTorch and ONNX runtimes take turns on the same weights and inputs."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from PIL import Image
from rich.text import Text
from torch import nn

from benchmarks import machine as machines
from benchmarks.cases._captions import texts
from benchmarks.engines import DTYPES, ENGINES, Array, Batch, Engine, Run, Subject
from benchmarks.results import Results, Row
from benchmarks.suite import device_of
from benchmarks.table import make_console, plain_table, print_absent, print_machine, print_notes
from evaclip.errors import UserError, unknown_name
from evaclip.loading import RANDOM, LoadedModel, load_model
from evaclip.machine import version_of
from evaclip.onnx_check import cosines

LONGEST = 15.0
"""Seconds of a call beyond which an engine isn't measured."""
PICTURES, CAPTIONS = 8, 24
"""So many, at most, are what cosines are taken of; of each picture six parts."""
LOWEST = {"fp32": 0.9999, "bf16": 0.995, "fp16": 0.995, "int8": 0.99}
"""A cosine below this is marked."""

_PAUSE = 0.05  # seconds in which the threads of the engine before cease to wait for more work
_PACKAGED = {"sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data", "skimage": "data"}
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        model: as `evaclip eval` takes it; by name alone it has random weights, matrices of deviation 0.05.
        towers, batches, dtypes: each with each.
        rounds: in which every engine is called once.
        engines: names; none for all.
        pictures: a folder of photographs; None for those that installed packages bring.
    """

    model: str
    towers: tuple[Literal["image", "text"], ...] = ("image",)
    batches: tuple[int, ...] = (1, 8, 32)
    dtypes: tuple[str, ...] = DTYPES
    rounds: int = 5
    engines: tuple[str, ...] = ()
    device: str = "cpu"
    pictures: Path | None = None

    def __post_init__(self) -> None:
        if min(self.batches) < 1 or self.rounds < 1:
            raise UserError(f"--batch and --rounds are 1 or more, got {min(self.batches)} and {self.rounds}")
        for name in self.engines:
            if name not in (known := [engine.name for engine in ENGINES]):
                raise unknown_name("engine", name, known)


@dataclass
class _Entry:
    """An engine in a dtype, its rows by batch, and what runs it, unless it failed."""

    engine: Engine
    rows: dict[int, Row]
    run: Run | None = None

    def fail(self, reason: str) -> None:
        """Says so in the rows that have no times yet."""
        self.run = None
        for row in self.rows.values():
            row.failure = None if row.samples_ms else reason


def measure(plan: Plan, say: Callable[[str], None]) -> Results:
    """Runs every engine that is here.

    Raises:
        UserError: there is no such model or folder, or there are no pictures.
    """
    loaded, device = load_model(plan.model), device_of(plan.device)
    loaded.model.eval().requires_grad_(False)
    packages = {package for engine in ENGINES for package in engine.packages} - {"evakernels"}
    machine = machines.describe(device, (torch.float32,), packages)
    if loaded.origin == RANDOM:
        _fill(loaded.model)
        machine.notes.append("random weights: cosines of 16 bits and int8 aren't those of a trained model")
    results, watch = Results(machine, []), machines.Watch(machine, device)
    for tower in plan.towers:
        with TemporaryDirectory() as folder:
            subject = Subject(loaded, tower, plan.device, Path(folder))
            results.rows += _measure_tower(plan, subject, results.absent, say)
    machine.notes += watch.notes()
    return results


def show(results: Results) -> None:
    """A table for each tower, and what there is no time of."""
    console = make_console()
    print_machine(console, results.machine)
    for op in dict.fromkeys(row.op for row in results.rows):
        rows = [row for row in results.rows if row.op == op]
        batches = list(dict.fromkeys(row.sizes["batch"] for row in rows))
        console.print(f"\n{op}: median and least ms of a call, inputs a second", style="bold")
        titles = [title for batch in batches for title in (f"{batch}: median", "least", "/s")]
        table = plain_table("engine", "dtype", "cosine", *titles, texts=3)
        for candidate, dtype in dict.fromkeys((row.candidate, row.dtype) for row in rows):
            own = {row.sizes["batch"]: row for row in rows if (row.candidate, row.dtype) == (candidate, dtype)}
            cells = [cell for batch in batches for cell in _cells(own.get(batch))]
            table.add_row(candidate, dtype, _cosine(list(own.values())), *cells)
        console.print(table)
    failed = {f"{row.op} {row.candidate} {row.dtype}: {row.failure}" for row in results.rows if row.failure}
    print_notes(console, [*sorted(failed), *results.machine.notes])
    print_absent(console, results.absent)


def _measure_tower(plan: Plan, subject: Subject, absent: dict[str, str], say: Callable[[str], None]) -> list[Row]:
    samples = _pictures(plan.pictures, subject.loaded) if subject.tower == "image" else _captions(subject.loaded)
    encode = subject.loaded.model.encode_image if subject.tower == "image" else subject.loaded.model.encode_text
    with torch.no_grad():
        expected = torch.cat([encode(part) for part in samples.tensor.split(8)]).numpy()
    entries = list(_entries(plan, subject, absent, say))
    for batch in sorted(plan.batches):
        ready = []
        for entry in (entry for entry in entries if entry.run is not None and batch in entry.rows):
            say(f"{subject.tower}, batch {batch}: {entry.engine.name} {entry.rows[batch].dtype}")
            try:
                _judge(entry, samples, expected, batch)
                ready.append(entry)
            except Exception as exc:  # Each engine has its own.
                entry.fail(_reason(exc))
        for _, entry in product(range(plan.rounds), ready):
            assert entry.run is not None
            time.sleep(_PAUSE)
            began = time.perf_counter()
            entry.run(_part(samples, 0, batch))
            entry.rows[batch].samples_ms[0].append(1e3 * (time.perf_counter() - began))
    return [row for entry in entries for row in entry.rows.values()]


def _entries(plan: Plan, subject: Subject, absent: dict[str, str], say: Callable[[str], None]) -> Iterator[_Entry]:
    for engine in ENGINES:
        if plan.engines and engine.name not in plan.engines:
            continue
        if reason := engine.absence(subject):
            absent[f"encode_{subject.tower}: {engine.name}"] = reason
            continue
        for dtype in (dtype for dtype in plan.dtypes if dtype in engine.dtypes):
            say(f"{subject.tower}: making {engine.name} {dtype}")
            entry = _Entry(engine, {batch: _row(engine, subject, dtype, batch) for batch in sorted(plan.batches)})
            try:
                entry.run = engine.build(subject, dtype)
            except Exception as exc:
                entry.fail(_reason(exc))
            yield entry


def _row(engine: Engine, subject: Subject, dtype: str, batch: int) -> Row:
    shape, version = f"{subject.loaded.name} b{batch}", version_of(engine.packages[0]) or ""
    return Row(
        f"encode_{subject.tower}",
        "forward",
        shape,
        dtype,
        subject.device,
        engine.name,
        engine.kind,
        version,
        sizes={"batch": batch},
    )


def _judge(entry: _Entry, samples: Batch, expected: Array, batch: int) -> None:
    """All samples in batches of this size: the first calls, which aren't timed, and the lowest cosine."""
    row, found = entry.rows[batch], []
    assert entry.run is not None
    for start in range(0, len(expected), batch):
        took = LONGEST + 1
        # Of the first calls one compiles.
        for _ in range(1 if start else 2):
            began = time.perf_counter()
            embeddings = entry.run(_part(samples, start, batch))
            took = time.perf_counter() - began
        if took > LONGEST:
            raise UserError(f"a call takes {took:.0f} s; {LONGEST:.0f} s are measured at most")
        found.append(embeddings)
    table = cosines(np.concatenate(found)[: len(expected)], expected)
    row.cosine, row.samples_ms = float(table.diagonal().min()), [[]]


def _part(samples: Batch, start: int, count: int) -> Batch:
    """So many from `start` on, from the beginning again behind the last."""
    places = [place % len(samples.given) for place in range(start, start + count)]
    return Batch([samples.given[place] for place in places], samples.tensor[places])


def _pictures(folder: Path | None, loaded: LoadedModel) -> Batch:
    """Photographs as a whole, their quarters and their middle, preprocessed."""
    folders = _packaged() if folder is None else [folder]
    files = sorted(path for each in folders for path in each.glob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise UserError(f"no photographs in {folder or 'scikit-learn or matplotlib'}; expected --pictures FOLDER")
    pixels = []
    for path in files[:PICTURES]:
        picture = Image.open(path)
        width, height = picture.width // 2, picture.height // 2
        places = [(0, 0), (width, 0), (0, height), (width, height), (width // 2, height // 2)]
        parts = [picture.crop((x, y, x + width, y + height)) for x, y in places]
        pixels += [loaded.transform(part) for part in (picture, *parts)]
    return Batch(pixels, torch.stack(pixels))


def _packaged() -> list[Path]:
    specs = {place: find_spec(package) for package, place in _PACKAGED.items()}
    return [Path(spec.origin).parent / place for place, spec in specs.items() if spec and spec.origin]


def _captions(loaded: LoadedModel) -> Batch:
    given = texts()[:CAPTIONS]
    return Batch(given, loaded.tokenizer(given))


def _fill(model: nn.Module) -> None:
    """Random weights under which attention isn't uniform, as it is under those that training starts from."""
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            parameter.normal_(std=0.05 if parameter.ndim > 1 else 0.1, generator=draw)


def _reason(exc: Exception) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"


def _cells(row: Row | None) -> list[str]:
    if row is None or row.median_ms is None:
        return [row.mark if row else "", "", ""]
    return [f"{row.median_ms:.1f}", f"{row.times[0]:.1f}", f"{1e3 * row.sizes['batch'] / row.median_ms:.1f}"]


def _cosine(rows: list[Row]) -> Text:
    found = [row.cosine for row in rows if row.cosine is not None]
    if not found:
        return Text("")
    low = min(found) < LOWEST[rows[0].dtype]
    return Text(f"{min(found):.7f}{'!' * low}", "bold red" if low else "")
