"""Compares a module with its replacement: both run on small random inputs, on a copy of the module.

A verdict holds for the process, for modules of equal classes, attributes and shapes, as long as the functions that
their code names stay the same objects.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten

from ._dispatch import run_all
from ._replacement import Call, Replacement
from ._swap import original_class_of, parameters_of, replacement_class

TOKENS = 12
"""Tokens of each of two samples."""

CHANNELS, HIDDEN, EMBEDDINGS = 32, 160, 256
"""Sizes of narrow copies: channels without attention, hidden channels, rows of embedding tables."""

MAX_PARAMETERS = 1 << 26
"""The largest copy at full size, which is compared if the narrow copy behaves differently or can't run."""

CODE_DEPTH = 3
"""How deep the key of a verdict follows calls: a function, its helpers and theirs."""

_HEADS = "num_heads", "num_kv_heads", "num_attention_heads"
_INTERNAL = frozenset(vars(nn.Module()))
_PLAIN = (type(None), bool, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True)
class Verdict:
    """The first difference between a module and its replacement, or None, and the arguments that were tried."""

    difference: str | None
    tried: frozenset[str] = frozenset()


_VERDICTS: dict[Any, Verdict] = {}


@dataclass(frozen=True)
class Sizes:
    """Maps the sizes of a module, and its numbers of attention heads, to those of a narrower copy."""

    dimensions: dict[int, int] = field(default_factory=dict)
    heads: dict[int, int] = field(default_factory=dict)

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(self.dimensions.get(size, size) for size in tensor.shape)

    def attribute(self, name: str, value: Any) -> Any:
        if type(value) is int:
            return (self.heads if name in _HEADS else self.dimensions).get(value, value)
        if type(value) in (tuple, list):
            return type(value)(self.attribute("", item) for item in value)
        return value


def narrow(module: nn.Module, omitted: set[nn.Module], dimensions: dict[int, int]) -> Sizes:
    """Sizes of a copy with two heads of keys or, without attention, 32 channels, and with narrow hidden layers.

    Args:
        module: the module.
        omitted: modules that the copy leaves out.
        dimensions: sizes to start with.
    """
    left_out = {part for module in omitted for part in module.modules()}
    parts = [part for part in module.modules() if part not in left_out]
    width, small, heads = width_of(module), CHANNELS, {}
    for part in parts:
        count, shared = getattr(part, "num_heads", None), getattr(part, "num_kv_heads", None)
        count = getattr(part, "num_attention_heads", None) if count is None else count
        if type(count) is int and count > 0:
            shared = shared if type(shared) is int and shared > 0 else count
            channels = width_of(part) // count
            width, small, heads = channels * shared, channels * 2, {count: count // shared * 2, shared: 2}
            break
    if width <= small:
        return Sizes()
    tensors = (tensor for part in parts for tensor in (*part.parameters(False), *part.buffers(False)))
    sizes = {size for tensor in tensors for size in tensor.shape if size}
    # Half of the width: a rotary table of each head has as many angles.
    units = {width // 2: small // 2}
    # Numbers of tokens that are also multiples of the width shrink like the width, all of them by one offset.
    shifts = [size // (width // 2) * (small // 2) - few for size, few in dimensions.items() if size % (width // 2) == 0]
    dimensions = {size: few + sum(shifts[:1]) for size, few in dimensions.items()}
    layers = {getattr(part, name, 0) for part in parts for name in ("in_features", "out_features")}
    hidden = sorted(size for size in layers if size > HIDDEN and size % (width // 2))
    units |= {size: HIDDEN + 16 * number for number, size in enumerate(hidden)}  # different sizes stay different
    units |= {p.num_embeddings: EMBEDDINGS for p in parts if isinstance(p, nn.Embedding)}
    rows = {size for part in parts for p in part.parameters(False) if p.dim() <= 2 for size in p.shape}
    dimensions = {**dimensions, **{count: fewer for count, fewer in heads.items() if count in rows}}
    for unit, smaller in units.items():
        multiples = {size for size in sizes if size % unit == 0} - dimensions.keys()
        dimensions |= {size: size // unit * smaller for size in multiples if smaller < unit}
    return Sizes(dimensions, heads)


def width_of(module: nn.Module) -> int:
    """Returns the channels of a module's input, read from its own matrix, its first layer or its first parameter."""
    for parameter in module.parameters(recurse=False):
        if parameter.dim() == 2:
            return int(parameter.shape[-1])
    for part in module.modules():
        shape = getattr(part, "normalized_shape", None)
        width = shape[-1] if isinstance(shape, tuple) and shape else getattr(part, "in_features", None)
        if type(width) is int:
            return width
    return next((int(p.shape[-1]) for p in module.parameters() if p.dim() > 0), 16)


def _count(module: nn.Module, omitted: set[nn.Module]) -> int:
    left_out = {parameter for part in omitted for parameter in part.parameters()}
    return sum(parameter.numel() for parameter in module.parameters() if parameter not in left_out)


class Comparisons:
    """Verdicts for the modules of one model."""

    def __init__(self) -> None:
        self._code: dict[type, Any] = {}

    def verdict(
        self, module: nn.Module, replacement: Replacement, classes: dict[nn.Module, type] | None = None
    ) -> Verdict:
        """Compares a module with its replacement, unless an equal one was compared before.

        Args:
            module: the module; it isn't changed.
            replacement: the candidate.
            classes: the classes that the replacement's tower gives its children; by default they keep their own.
        """
        tower = replacement.tower
        omitted = set() if tower is None else tower.unused(module)
        hidden = omitted | {child for name, child in module.named_children() if name == replacement.stem}
        verdict = Verdict("nothing was tried")
        smaller = narrow(module, omitted, replacement.sizes(module))
        for sizes in (smaller, Sizes()) if smaller.dimensions else (smaller,):
            described = self._describe(module, sizes, hidden, classes or {})
            key = replacement.forward, replacement.target != "", replacement.calls, described
            if key not in _VERDICTS:
                if sizes is not smaller and _count(module, omitted) > MAX_PARAMETERS:
                    break
                _VERDICTS[key] = _compare_on_copies(module, replacement, sizes, omitted, classes or {})
            verdict = _VERDICTS[key]
            if verdict.difference is None:
                break
        return verdict

    def _describe(
        self, module: nn.Module, sizes: Sizes, omitted: set[nn.Module], classes: dict[nn.Module, type]
    ) -> Any:
        """A key that is equal for modules that do the same to their inputs."""
        cls = original_class_of(module)
        if cls not in self._code:
            self._code[cls] = _code_of(cls)
        tensors = {**module._parameters, **module._buffers}
        return (
            cls,
            classes.get(module),
            self._code[cls],
            tuple((name, None if tensor is None else sizes.shape(tensor)) for name, tensor in tensors.items()),
            tuple(
                (name, _key(sizes.attribute(name, value), sizes))
                for name, value in vars(module).items()
                if name not in _INTERNAL and (name[0] != "_" or type(value) in (*_PLAIN, int))
            ),
            tuple(
                (name, self._describe(child, sizes, omitted, classes))
                for name, child in module._modules.items()
                if child is not None and child not in omitted
            ),
        )


# --- the key ----------------------------------------------------------------------------------------------------------


def _key(value: Any, sizes: Sizes = Sizes(), depth: int = 2) -> Any:
    """A hashable stand-in for a value: by value if it is plain, by identity if it is code."""
    if type(value) is int:
        return sizes.dimensions.get(value, value)
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), value.dtype
    if isinstance(value, FunctionType | type) or inspect.isbuiltin(value):
        return value
    if isinstance(value, partial):
        return _key(value.func), _key(value.args), _key(value.keywords)
    if depth and isinstance(value, tuple | list):
        return type(value), tuple(_key(item, sizes, depth - 1) for item in value)
    if depth and isinstance(value, dict | MappingProxyType):
        return type(value), tuple((str(name), _key(item, sizes, depth - 1)) for name, item in value.items())
    if depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module | ModuleType):
        return type(value), _key(vars(value), sizes, depth - 1)
    return type(value)


def _code_of(cls: type) -> Any:
    """The functions of a class and of its bases up to `nn.Module`, with the globals that their code reads."""
    found: list[Any] = []
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for name, member in vars(base).items():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if isinstance(function, FunctionType):
                found.append((name, *_references(function, CODE_DEPTH)))
            elif isinstance(member, (*_PLAIN, int)) and name[:2] != "__":
                found.append((name, _key(member)))
    return tuple(found)


def _references(function: FunctionType, depth: int) -> Iterator[Any]:
    """A function and, to a depth, the globals and closure variables that its code names."""
    yield function
    if not depth:
        return
    names = dict.fromkeys(_names(function.__code__))
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # empty
            values.append(cell.cell_contents)
    modules = []
    for value in values:  # grows
        if isinstance(value, FunctionType):
            yield from _references(value, depth - 1)
        elif not isinstance(value, ModuleType):
            yield _key(value)
        elif value not in modules:
            modules.append(value)
            values += [vars(value)[name] for name in names if name in vars(value)]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


# --- the copies -------------------------------------------------------------------------------------------------------


def _compare_on_copies(
    module: nn.Module, replacement: Replacement, sizes: Sizes, omitted: set[nn.Module], classes: dict[nn.Module, type]
) -> Verdict:
    stem = module._modules.get(replacement.stem)
    parameters: dict[Any, Tensor] = {}
    with torch.random.fork_rng([]), _clean_state():
        try:
            _seed(1)
            own, new = (_Copies(sizes, omitted, stem, parameters, c).of(module) for c in ({}, classes))
            for copied in (own, new):
                vars(copied).update(replacement.settings)
            new.__class__ = replacement_class(type(new), replacement.forward)
            return _compare(own, new, replacement)
        except Exception as error:
            return Verdict(f"no comparison can be made: {_line(error)}")


@contextmanager
def _clean_state() -> Iterator[None]:
    """Eager float32 on the CPU with gradients, even if the caller has set other modes."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
        autocast = torch.autocast("cpu", enabled=False)
        with _disable_current_modes(), device, torch.inference_mode(False), torch.enable_grad(), autocast:
            yield
    finally:
        torch.set_default_dtype(dtype)


@dataclass
class _Copies:
    """Copies of modules with their original classes, without hooks, with random parameters on the CPU.

    Attributes:
        sizes: the sizes of the copies.
        omitted: modules to leave out.
        stem: a module to replace by the identity.
        parameters: random parameters by their originals; copies with the same dictionary share them.
        classes: classes to give to copies, by their originals.
    """

    sizes: Sizes
    omitted: set[nn.Module]
    stem: nn.Module | None
    parameters: dict[Any, Tensor]
    classes: dict[nn.Module, type]
    copies: dict[nn.Module, Any] = field(default_factory=dict)

    def of(self, module: nn.Module) -> Any:
        if module in self.copies:
            return self.copies[module]
        cls: Any = self.classes.get(module) or original_class_of(module)
        copied = self.copies[module] = cls.__new__(cls)
        nn.Module.__init__(copied)
        for name, value in vars(module).items():
            if name not in _INTERNAL:
                copied.__dict__[name] = self._attribute(name, value)
        if module is self.stem:
            copied.__class__ = nn.Identity
            return copied
        for name, parameter in module._parameters.items():
            copied._parameters[name] = None if parameter is None else self._parameter(parameter, id(parameter))
        for name, buffer in module._buffers.items():
            copied._buffers[name] = None if buffer is None else self._buffer(buffer)
        if is_parametrized(module):
            for name in module.parametrizations:  # type: ignore[union-attr]
                copied._parameters[name] = self._parameter(getattr(module, name), (id(module), name))
        children = {name: child for name, child in module._modules.items() if child not in self.omitted}
        if len(children) < len(module._modules) and isinstance(module, nn.Sequential | nn.ModuleList):
            children = {str(number): child for number, child in enumerate(children.values())}
        for name, child in children.items():
            if not (name == "parametrizations" and is_parametrized(module)):
                copied._modules[name] = None if child is None else self.of(child)
        return copied

    def _attribute(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._buffer(value)
        if type(value) in (dict, set):
            return value.copy()
        return self.sizes.attribute(name, value)

    def _parameter(self, parameter: Tensor, key: Any) -> Tensor:
        if key not in self.parameters:
            is_float = parameter.is_floating_point()
            value = _random(self.sizes.shape(parameter)) if is_float else self._buffer(parameter)
            self.parameters[key] = nn.Parameter(value, requires_grad=is_float)
        return self.parameters[key]

    def _buffer(self, buffer: Tensor) -> Tensor:
        shape, dtype = self.sizes.shape(buffer), torch.float32 if buffer.is_floating_point() else buffer.dtype
        if buffer.is_meta or shape != tuple(buffer.shape):
            return torch.full(shape, 0.5 if dtype == torch.float32 else 0, dtype=dtype)
        copied: Tensor = buffer.detach().to("cpu", dtype, copy=True)
        return copied


def _random(shape: tuple[int, ...]) -> Tensor:
    """Values that hide no error, as zeros would; large ones repeat a prime number of values."""
    count, period = int(torch.Size(shape).numel()), 65521
    values: Tensor = torch.rand(min(count, period))
    values = values.repeat(-(-count // period))[:count].view(shape)
    if len(shape) < 2:
        return values * 0.5 + 0.3
    return (values - 0.5).mul(math.sqrt(12 / max(1, shape[-1])))


# --- the comparison ---------------------------------------------------------------------------------------------------


def _compare(own: Any, new: Any, replacement: Replacement) -> Verdict:
    _seed(1)
    methods = (getattr(type(module), replacement.forward.method) for module in (own, new))
    signature = inspect.Signature(parameters_of(*methods))
    try:
        x = torch.randn(2, TOKENS, width_of(own), requires_grad=True)
        calls = [bound for call in replacement.calls(own, x) if (bound := _bind(signature, call))]
    except Exception as error:
        return Verdict(f"no input can be made: {_line(error)}")
    if not calls:
        return Verdict("its arguments have other names")
    tried: set[str] = set()
    for number, bound in enumerate(calls):
        by_position = bound.args, bound.kwargs
        by_name = _by_name(signature, bound) if replacement.target else by_position
        for mode in _MODES if number == 0 else _MODES[:1] if replacement.tower else _MODES[:2]:
            call = by_name if mode.training else by_position
            if mode.dtype != torch.float32:
                own.to(mode.dtype), new.to(mode.dtype)
                call = _cast(call, mode.dtype)
            try:
                expected = _run(own, call, mode, replacement)
            except Exception as error:
                if number == 0 and mode is _MODES[0]:
                    return Verdict(f"its own code raises {_line(error)}")
                continue
            if not replacement.target:
                del expected["input"]  # a fused step has no use for its child's input
            for serving in (run_all, nullcontext) if mode.unfused and not replacement.tower else (run_all,):
                try:
                    with serving():
                        actual = _run(new, call, mode, replacement)
                except Exception as error:
                    return Verdict(f"its replacement raises {_line(error)}{mode.where}")
                for part, theirs in expected.items():
                    if not _is_close(actual[part], theirs, mode.tolerance):
                        return Verdict(f"its {part} {'differ' if part.endswith('s') else 'differs'}{mode.where}")
            tried |= bound.arguments.keys()
        own.float(), new.float()
    return Verdict(None, frozenset(tried))


@dataclass(frozen=True)
class _Mode:
    """How a call runs.

    Attributes:
        where: for the report.
        training: whether the module is in training mode, with arguments by name instead of by position.
        gradients: "compared", "graph" for a forward pass that records a graph, or "off".
        unfused: whether the code that runs where no op is faster is compared, too.
        tolerance: largest accepted difference, relative to the largest value: sums have another order.
    """

    where: str = ""
    training: bool = False
    gradients: str = "compared"
    unfused: bool = False
    autocast: bool = False
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5


_MODES = (
    _Mode(),
    _Mode(" in training", training=True, unfused=True),
    _Mode(" without gradients", gradients="off", unfused=True),
    _Mode(" under autocast", gradients="graph", autocast=True, tolerance=6e-2),
    _Mode(" in bfloat16", gradients="off", dtype=torch.bfloat16, tolerance=6e-2),
)


def _cast(call: Call, dtype: torch.dtype) -> Call:
    values, spec = tree_flatten(call)
    cast = [v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]
    result: Call = spec.unflatten(cast)
    return result


def _bind(signature: inspect.Signature, call: Call) -> inspect.BoundArguments | None:
    """The call's arguments by name; None if the signature lacks one of them."""
    with suppress(TypeError):
        return signature.bind(*call[0], **call[1])
    return None


def _by_name(signature: inspect.Signature, bound: inspect.BoundArguments) -> Call:
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
        return bound.args, bound.kwargs
    options: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        options |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return (), options


def _line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:100]}" if text else type(error).__name__


def _run(module: Any, call: Call, mode: _Mode, replacement: Replacement) -> dict[str, Any]:
    """The outputs of a call, its gradients, its inputs afterwards and the random numbers that it draws."""
    values, spec = tree_flatten(call)
    tensors = {id(value): value for value in values if isinstance(value, Tensor)}  # one given twice stays one
    leaves = {key: value.detach().clone().requires_grad_(value.requires_grad) for key, value in tensors.items()}
    inputs = {key: leaf.clone() for key, leaf in leaves.items()}  # they may be changed in place
    args, options = spec.unflatten([inputs.get(id(value), value) for value in values])
    module.train(mode.training)
    _seed(2)
    with torch.set_grad_enabled(mode.gradients != "off"), torch.autocast("cpu", torch.bfloat16, enabled=mode.autocast):
        called = module if replacement.forward.method == "forward" else getattr(module, replacement.forward.method)
        result = replacement.compared(called(*args, **options))
    drawn = torch.rand(2)
    outputs, structure = tree_flatten(result)
    results = [value for value in outputs if isinstance(value, Tensor)]
    needs_grad = [tensor for tensor in (*leaves.values(), *module.parameters()) if tensor.requires_grad]
    return {
        "structure": [(structure, [value if not isinstance(value, Tensor) else None for value in outputs])],
        "output": [value.detach() for value in results],
        "input": [value.detach() for value in inputs.values()],
        "buffers": [buffer.detach().clone() for buffer in module.buffers()],
        "random numbers": [drawn],
        "gradients": _gradients(results, needs_grad) if mode.gradients == "compared" else [],
    }


def _gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a sum in which every element of the outputs has its own random weight."""
    _seed(3)
    terms = [(v.float() * torch.rand(v.shape)).sum() for v in outputs if v.requires_grad]
    if not terms:
        return []
    found = torch.autograd.grad(torch.stack(terms).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(inputs, found, strict=True)]


def _is_close(actual: list[Any], expected: list[Any], tolerance: float) -> bool:
    if len(actual) != len(expected):
        return False
    if not all(isinstance(b, Tensor) for b in expected):
        return actual == expected
    largest = max((float(b.float().abs().max()) for b in expected if b.numel()), default=0.0)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and _distance(a, b) <= tolerance * largest
        for a, b in zip(actual, expected, strict=True)
    )


def _distance(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b) or not a.numel():
        return 0.0
    if a.isnan().any():  # torch's fast path for inference makes them from some masks
        return 0.0 if torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) else float("inf")
    return float((a.float() - b.float()).abs().max())


def _seed(number: int) -> None:
    """Seeds the CPU's generator alone: `torch.manual_seed` formats a stack for each device that isn't in use."""
    torch.default_generator.manual_seed(number)
