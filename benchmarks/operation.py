"""Operations with their inputs, their cost by formula and their peers, and the registry of both."""

import importlib
import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.shapes import Shape, parse_shape
from evaclip.errors import UserError, hint, unknown_name
from evaclip.machine import version_of

Inputs = dict[str, Any]
Outputs = Any
"""A tensor, or a tuple of tensors."""
Function = Callable[..., Outputs]
Kind = Literal["ours", "baseline", "peer", "quantized"]
"""Candidates of fewer bits than the measured dtype, `quantized`, take no part in verdicts."""

EMBED = "embed"
"""The operation with a table of engines."""
NVIDIA_APEX = "from the source of https://github.com/NVIDIA/apex; the package of that name on PyPI is another"
_NUMBERS = re.compile(r"\d+(x\d+)*")


@dataclass(frozen=True)
class Cost:
    """Least work of one pass.

    Attributes:
        flops: floating-point operations of the matmuls; one multiply-add counts as two.
        bytes: each input read once and each output written once.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """The cost of the forward pass, and of the backward pass if there is one."""

    forward: Cost
    backward: Cost | None = None


def count_passes(channels: str, forward: int, backward: int) -> Callable[[Shape, int], Work]:
    """The cost in passes over `[B, N, C]`; values per channel are too small to count.

    Args:
        channels: the size C of the shape, `width` or `hidden`.
        forward, backward: how often a tensor of this size is read or written.
    """

    def work(shape: Shape, itemsize: int) -> Work:
        unit = shape.batch * shape.tokens * getattr(shape, channels) * itemsize
        return Work(Cost(0, forward * unit), Cost(0, backward * unit))

    return work


@dataclass(frozen=True)
class Draw:
    """Draws the inputs of an operation: normal random numbers, never zeros, the same for the same seed."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def normal(self, *size: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers of the given size, in the measured dtype unless another is named."""
        values = torch.randn(size, generator=self.generator, device=self.device)
        return values.mul_(scale).add_(mean).to(dtype or self.dtype)

    def integers(self, high: int, *size: int) -> Tensor:
        """Integers from 0 to `high` - 1."""
        return torch.randint(high, size, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Operation:
    """One op.

    Attributes:
        name: name on the command line.
        summary: one line about the computation.
        inputs: draws the keyword arguments of every candidate.
        eager: the same in plain PyTorch. Speed and error of every candidate are compared with it; on float64 inputs it
            is the truth.
        ours: this library's function.
        work: the cost by formula, given the bytes of one element.
        shapes: default shapes by device type.
        dtypes: default dtypes; empty for those usual on the device.
        gradients: names of the inputs that get gradients in training; none for an op without backward.
        registered: the registered op, such as `layer_norm_forward`; None for a composition of several ops, which is
            measured with the backends that they choose, and on the references.
        baseline, baseline_package: name and distribution of `eager`.
        variants: other ways to call this library's function, by name.
        parse: the shape of a name.
        raw: the shape of sizes alone, such as `4096x768`; its parameters name them. None where sizes aren't enough.
        small: a shape so small that the host's part of a call counts; `--shape small`.
        by_request: it takes so long that it is measured only when it is named.
        is_model: whole models, which the command `model` measures.
        references: a composition is also measured on this library's references.
        compiles: `eager` through torch.compile is a peer; False where other peers do that in another way.
    """

    name: str
    summary: str
    inputs: Callable[[Any, Draw], Inputs]
    eager: Function
    ours: Function
    work: Callable[[Any, int], Work]
    shapes: Mapping[str, Sequence[str]]
    dtypes: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    registered: str | None = None
    baseline: str = "torch eager"
    baseline_package: str = "torch"
    variants: Mapping[str, Function] = field(default_factory=dict)
    parse: Callable[[str], Shape] = parse_shape
    raw: Callable[..., Shape] | None = None
    small: str = "tiny@32 b1"
    by_request: bool = False
    is_model: bool = False
    references: bool = True
    compiles: bool = True

    @property
    def modes(self) -> tuple[str, ...]:
        """`forward` runs without autograd; `training` is forward and backward."""
        return ("forward", "training") if self.gradients else ("forward",)

    @property
    def raw_sizes(self) -> tuple[str, ...]:
        """Names of the sizes in `4096x768`; empty where there are none."""
        return tuple(signature(self.raw).parameters) if self.raw else ()

    def shape(self, name: str) -> Shape:
        """The shape called `name`, the one of sizes alone, such as `4096x768`, or `small`.

        Raises:
            UserError: there is no such shape.
        """
        name = (self.small if name == "small" else name).strip()
        if _NUMBERS.fullmatch(name):
            return self._raw_shape(name)
        try:
            return self.parse(name)
        except UserError as exc:
            known = [shape for shapes in self.shapes.values() for shape in shapes]
            if "did you mean" in str(exc):
                raise
            raise UserError(f"{exc}{hint(name, known)}") from None

    def _raw_shape(self, name: str) -> Shape:
        if self.raw is None:
            example = next(iter(self.shapes.values()))[0]
            raise UserError(f"shape {name!r}: {self.name} needs more than sizes; expected a name such as {example!r}")
        sizes, names = [int(size) for size in name.split("x")], self.raw_sizes
        if len(sizes) != len(names) or min(sizes) < 1:
            raise UserError(f"shape {name!r}: {self.name} has {len(names)} sizes of 1 or more, {' x '.join(names)}")
        return replace(self.raw(*sizes), name="x".join(map(str, sizes)))


@dataclass(frozen=True)
class Peer:
    """Somebody else's implementation of an operation.

    Attributes:
        name: name in tables.
        build: makes the function for a shape, and imports its package.
        package: its distribution; None for torch itself and for users' files.
        devices: device types.
        install: how to get it; None for `pip install` of the package.
        needs: further distributions.
        kind: `peer`; `ours` for another way to use this library; `quantized` for fewer bits than the measured dtype.
    """

    name: str
    build: Callable[[Any], Function]
    package: str | None
    devices: tuple[str, ...]
    install: str | None = None
    needs: tuple[str, ...] = ()
    kind: Kind = "peer"

    def absence(self, device: str) -> str | None:
        """The reason why it can't be measured here; None if it can."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        missing = [name for name in (self.package, *self.needs) if name is not None and version_of(name) is None]
        return f"not installed: {self.install or 'pip install ' + ' '.join(missing)}" if missing else None


_operations: dict[str, Operation] = {}
_peers: dict[str, list[Peer]] = {}


def register(op: Operation) -> Operation:
    """Registers an operation."""
    _operations[op.name] = op
    return op


def peer(
    op: str,
    name: str | None = None,
    *,
    package: str | None = None,
    devices: Sequence[str] = ("cpu", "cuda"),
    **options: Any,
) -> Callable[[Callable[[Any], Function]], Callable[[Any], Function]]:
    """Registers the decorated builder as a peer of the operation `op`.

    The builder takes a `Shape` and returns a function of the operation's inputs by keyword. It is shown as `name`, or
    else as `package`; further `options` are attributes of `Peer`.

    Raises:
        UserError: it has neither, or there is no such operation.
    """
    get_operation(op)
    shown = name or package
    if shown is None:
        raise UserError(f"a peer of {op!r} has neither a name nor a package")

    def add(build: Callable[[Any], Function]) -> Callable[[Any], Function]:
        _peers.setdefault(op, []).append(Peer(shown, build, package, tuple(devices), **options))
        return build

    return add


def operations() -> dict[str, Operation]:
    """All operations by name."""
    return dict(_operations)


def suite(models: bool) -> list[Operation]:
    """The ops, or the whole models, that are measured when none is named."""
    return [op for op in _operations.values() if op.is_model == models and not op.by_request]


def get_operation(name: str) -> Operation:
    """The operation called `name`. Raises `UserError` with the nearest names if there is none."""
    if name not in _operations:
        raise unknown_name("operation", name, _operations)
    return _operations[name]


def peers_of(op: str) -> list[Peer]:
    """All peers of an operation, in the order of registration."""
    return list(_peers.get(op, ()))


def load(plugins: Sequence[Path] = ()) -> None:
    """Register the operations of `benchmarks.cases`, and run the user's files, which register theirs.

    Raises:
        UserError: a file isn't there, can't be run, registers nothing, or names an operation that doesn't exist.
    """
    importlib.import_module("benchmarks.cases")
    for path in plugins:
        if not path.is_file():
            known = map(str, path.parent.glob("*.py"))
            raise UserError(f"--plugin must be a Python file, got {str(path)!r}{hint(path, known)}")
        before = _count()
        try:
            runpy.run_path(str(path))
        except (Exception, SystemExit) as exc:
            raise UserError(f"--plugin {str(path)!r} ends with {type(exc).__name__}: {exc}") from exc
        if _count() == before:
            raise UserError(f"--plugin {str(path)!r} registers nothing; it needs a @peer(OPERATION, NAME)")


def _count() -> int:
    return len(_operations) + sum(map(len, _peers.values()))
