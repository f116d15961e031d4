"""Operations with their inputs, their cost by formula and their peers, and the registry of both."""

import importlib
import importlib.util
import re
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
"""Candidates of fewer bits than the dtype measured, `quantized`, take no part in verdicts."""


@dataclass(frozen=True)
class Cost:
    """Least work of one pass.

    Attributes:
        flops: floating-point operations of the matrix products; one multiply-add counts as two.
        bytes: each input read once and each output written once.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """The cost of the forward pass, and that of the backward pass if there is one."""

    forward: Cost
    backward: Cost | None = None


@dataclass(frozen=True)
class Draw:
    """Draws the inputs of an operation: normal random numbers, never zeros, the same for the same seed."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def normal(self, *size: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers of the given size, in the dtype that is measured unless another is named."""
        values = torch.randn(size, generator=self.generator, device=self.device)
        return values.mul_(scale).add_(mean).to(dtype or self.dtype)

    def integers(self, high: int, *size: int) -> Tensor:
        """Integers from 0 to `high` - 1."""
        return torch.randint(high, size, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Baseline:
    """The name under which `Operation.eager` is shown, and its distribution."""

    name: str
    package: str


TORCH_EAGER = Baseline("torch eager", "torch")

_NUMBERS = re.compile(r"\d+(x\d+)*")


@dataclass(frozen=True)
class Operation:
    """One op.

    Attributes:
        name: name on the command line.
        summary: one line about the computation.
        inputs: draws the keyword arguments that every candidate is called with.
        eager: the same in plain PyTorch. Speed and error of every candidate are compared with it; on float64 inputs it
            is the truth.
        ours: this library's function.
        baseline: name and distribution of `eager`.
        variants: other ways to call this library's function, by name.
        work: the cost by formula, given the bytes of one element.
        shapes: default shapes by device type.
        parse: the shape that a name stands for.
        raw: the shape of sizes alone, such as those of `4096x768`; its parameters name them. None where sizes aren't
            enough.
        gradients: names of the inputs that get gradients in training; none for an op without backward.
        registered: the registered op, such as `layer_norm_forward`; None for a composition
            of several ops, which is measured with the backends that are chosen for it, and on the references.
        small: a shape so small that the host's part of a call counts; `--shape small`.
        by_request: it takes so long that it is measured only when it is named.
        is_model: whole models, which the command `model` measures.
        references: a composition is also measured on this library's references.
        compiles: `eager` through torch.compile is a peer; False where peers of its own do that in another way.
    """

    name: str
    summary: str
    inputs: Callable[[Any, Draw], Inputs]
    eager: Function
    ours: Function
    work: Callable[[Any, int], Work]
    shapes: Mapping[str, Sequence[str]]
    gradients: tuple[str, ...] = ()
    registered: str | None = None
    baseline: Baseline = TORCH_EAGER
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
        """Names of the sizes that `4096x768` gives; empty where there are none."""
        return tuple(signature(self.raw).parameters) if self.raw else ()

    def shape(self, name: str) -> Shape:
        """The shape called `name`, the one of sizes alone, such as `4096x768`, or `small`.

        Raises:
            UserError: there is no such shape.
        """
        if name == "small":
            name = self.small
        if _NUMBERS.fullmatch(name.strip()):
            return self._raw_shape(name.strip())
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
        name: how it is shown.
        build: makes the function for a shape, and imports its package.
        package: the distribution it comes from; None for torch itself and for one's own files.
        devices: the device types it runs on.
        install: how to get it; None for `pip install` of the package.
        needs: further distributions that it needs.
        kind: `peer`; `ours` for another way to use this library; `quantized` for fewer bits than the dtype measured.
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

    @property
    def version(self) -> str | None:
        """The version of its distribution; None if it isn't installed."""
        return version_of(self.package or "torch")


@dataclass
class _Registry:
    operations: dict[str, Operation] = field(default_factory=dict)
    peers: dict[str, list[Peer]] = field(default_factory=dict)


NVIDIA_APEX = "from the source of https://github.com/NVIDIA/apex; the package of that name on PyPI is another"

_registry = _Registry()


def register(op: Operation) -> Operation:
    """Registers an operation."""
    _registry.operations[op.name] = op
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

    The builder takes a `Shape` and returns the function that is called with the operation's inputs by keyword. It is
    shown as `name`, or else as `package`; further `options` are attributes of `Peer`.

    Raises:
        UserError: it has neither, or there is no such operation.
    """
    get_operation(op)
    shown = name or package
    if shown is None:
        raise UserError(f"a peer of {op!r} has neither a name nor a package")

    def add(build: Callable[[Any], Function]) -> Callable[[Any], Function]:
        _registry.peers.setdefault(op, []).append(Peer(shown, build, package, tuple(devices), **options))
        return build

    return add


def operations() -> dict[str, Operation]:
    """All operations by name."""
    return dict(_registry.operations)


def suite(models: bool) -> list[Operation]:
    """The ops, or the whole models, that are measured when none is named."""
    return [op for op in _registry.operations.values() if op.is_model == models and not op.by_request]


def get_operation(name: str) -> Operation:
    """The operation called `name`. Raises `UserError` with the nearest names if there is none."""
    if name not in _registry.operations:
        raise unknown_name("operation", name, _registry.operations)
    return _registry.operations[name]


def peers_of(op: str) -> list[Peer]:
    """Everybody registered for an operation, in the order of registration."""
    return list(_registry.peers.get(op, ()))


def load(plugins: Sequence[Path] = ()) -> None:
    """Register the operations that ship, and run the user's files, which register theirs.

    Raises:
        UserError: a file isn't there, can't be run, registers nothing, or names an operation that doesn't exist.
    """
    importlib.import_module("benchmarks.cases")
    for path in plugins:
        before = _count()
        _run(path)
        if _count() == before:
            raise UserError(f"--plugin {str(path)!r} registers nothing; it needs a @peer(OPERATION, NAME)")


def _count() -> int:
    return len(_registry.operations) + sum(map(len, _registry.peers.values()))


def _run(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--plugin {str(path)!r} isn't a Python file{hint(path, map(str, path.parent.glob('*.py')))}")
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except (Exception, SystemExit) as exc:
        raise UserError(f"--plugin {str(path)!r} ends with {type(exc).__name__}: {exc}") from exc
