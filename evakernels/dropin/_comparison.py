"""Compares a module with its replacement: both run on small random inputs, on a copy of the module.

Modules of equal classes, attributes and shapes share a verdict within one call of `accelerate`.
"""

import inspect
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten

from ._dispatch import ALWAYS, NEVER
from ._replacement import Call, Replacement, draw
from ._swap import AcceleratedModule, find_original_class, list_parameters, replacement_class

TOKENS = 12
"""Tokens of each of two samples."""

CHANNELS, HIDDEN, EMBEDDINGS = 32, 160, 256
"""Sizes of narrow copies: channels without attention, hidden channels, rows of embedding tables."""

MAX_PARAMETERS = 1 << 26
"""The largest copy at full size, which is compared if the narrow copy behaves differently or can't run."""

_HEADS = "num_heads", "num_kv_heads", "num_attention_heads"
_INTERNAL = frozenset(vars(nn.Module()))
_PLAIN = (type(None), int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True)
class Verdict:
    """The first difference between a module and its replacement, or None, and the arguments that were tried."""

    difference: str | None
    tried: frozenset[str] = frozenset()


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
    width, small, heads = input_width(module), CHANNELS, {}
    for part in parts:
        count, shared = getattr(part, "num_heads", None), getattr(part, "num_kv_heads", None)
        count = getattr(part, "num_attention_heads", None) if count is None else count
        if type(count) is int and count > 0:
            shared = shared if type(shared) is int and shared > 0 else count
            channels = input_width(part) // count
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
    integers = (buffer for part in parts for buffer in part.buffers(False) if not buffer.is_floating_point())
    return Sizes() if any(dimensions.keys() & {*buffer.shape} for buffer in integers) else Sizes(dimensions, heads)


def input_width(module: nn.Module) -> int:
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
    """Verdicts for the modules of one model, in one call of `accelerate`."""

    def __init__(self) -> None:
        self._verdicts: dict[Any, Verdict] = {}

    def verdict(
        self, module: nn.Module, replacement: Replacement, classes: dict[nn.Module, type] | None = None
    ) -> Verdict:
        """Compares a module with its replacement, unless an equal one was compared before.

        Args:
            module: the module; it isn't changed.
            replacement: the candidate.
            classes: the classes that the replacement's tower gives its children; by default they keep their own.
        """
        tower, classes = replacement.tower, classes or {}
        omitted = set() if tower is None else tower.unused(module)
        stem = module._modules.get(replacement.stem)
        constants = _find_constants(module, replacement)
        verdict = Verdict("nothing was tried")
        with _clean_state():
            smaller = narrow(module, omitted, replacement.sizes(module))
            for sizes in (smaller, Sizes()) if smaller.dimensions else (smaller,):
                copies = _Copies(sizes, omitted, stem, constants)
                key = replacement.forward, replacement.target, replacement.calls, copies.key(module, classes)
                if key not in self._verdicts:
                    if sizes is not smaller and _count(module, omitted) > MAX_PARAMETERS:
                        break
                    self._verdicts[key] = _compare_on_copies(module, replacement, copies, classes)
                verdict = self._verdicts[key]
                if verdict.difference is None:
                    break
        return verdict


def _find_constants(module: nn.Module, replacement: Replacement) -> set[int]:
    """The ids of the buffers that keep their values in a copy."""
    children = [module._modules.get(name) for name in replacement.constants]
    buffers = [module._buffers.get(name) for name in replacement.constants]
    return {id(buffer) for child in children if child is not None for buffer in child.buffers()} | {*map(id, buffers)}


def _key(value: Any, depth: int = 3) -> Any:
    """A hashable stand-in for an attribute: the value or items if these are plain, otherwise the object's identity."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if depth and isinstance(value, partial):
        return _key(value.func, 0), _key(value.args, depth - 1), _key(value.keywords, depth - 1)
    if depth and isinstance(value, tuple | list):
        return type(value), tuple(_key(item, depth - 1) for item in value)
    if depth and type(value) is dict:
        return dict, tuple((_key(name), _key(item, depth - 1)) for name, item in value.items())
    return "id", id(value)


# --- the copies -------------------------------------------------------------------------------------------------------


_ONE_AT_A_TIME = threading.Lock()


def _compare_on_copies(
    module: nn.Module, replacement: Replacement, copies: "_Copies", classes: dict[nn.Module, type]
) -> Verdict:
    def compare(seeded: bool) -> Verdict:
        try:
            original, replaced = copies.pair(module, classes)
            for copied in (original, replaced):
                vars(copied).update(replacement.settings)
            replaced.__class__ = replacement_class(type(replaced), replacement.forward)
            return _compare(original, replaced, replacement, seeded)
        except Exception as error:
            return Verdict(f"no comparison can be made: {_line(error)}")

    with _ONE_AT_A_TIME:
        state = torch.get_rng_state()
        verdict = compare(seeded=False)
        if torch.equal(torch.get_rng_state(), state):
            return verdict
        # The modules draw from torch's default generator, which no context replaces: it is seeded, then restored.
        torch.set_rng_state(state)
        with torch.random.fork_rng([]):
            return compare(seeded=True)


@contextmanager
def _clean_state() -> Iterator[None]:
    """Eager code on the CPU with gradients in this thread, even if the caller has set other modes."""
    device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    autocast = torch.autocast("cpu", enabled=False)
    with _disable_current_modes(), device, torch.inference_mode(False), torch.enable_grad(), autocast:
        yield


@dataclass
class _Copies:
    """Copies of a module with original classes, without hooks, with random float tensors on the CPU.

    Attributes:
        sizes: the sizes of the copies.
        omitted: modules to leave out.
        stem: a module to replace by the identity.
        constants: ids of float buffers that keep their values.
        values: random values by the ids of their originals; a pair of copies shares the parameters.
    """

    sizes: Sizes
    omitted: set[nn.Module]
    stem: nn.Module | None
    constants: set[int]
    values: dict[Any, Tensor] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def key(self, module: nn.Module, classes: dict[nn.Module, type]) -> Any:
        """A value that is equal for modules with equal copies."""
        tensors = [
            (name, None if tensor is None else self._tensor_key(tensor))
            for named in (module._parameters, module._buffers)
            for name, tensor in named.items()
        ]
        attributes = [
            (
                name,
                self._tensor_key(value) if isinstance(value, Tensor) else _key(self.sizes.attribute(name, value)),
            )
            for name, value in vars(module).items()
            if name not in _INTERNAL
        ]
        children = [
            (name, self.key(child, classes))
            for name, child in module._modules.items()
            if child is not None and child not in self.omitted and child is not self.stem
        ]
        return find_original_class(module), classes.get(module), tuple(tensors), tuple(attributes), tuple(children)

    def pair(self, module: nn.Module, classes: dict[nn.Module, type]) -> tuple[Any, Any]:
        """A copy with original classes, and one with the given classes by their originals."""
        self.values.clear()
        self.generator.manual_seed(1)
        return self._copy(module, {}, {}), self._copy(module, classes, {})

    def _copy(self, module: nn.Module, classes: dict[nn.Module, type], copies: dict[nn.Module, Any]) -> Any:
        if module in copies:
            return copies[module]
        cls: Any = classes.get(module) or find_original_class(module)
        copied = copies[module] = cls.__new__(cls)
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
                copied._modules[name] = None if child is None else self._copy(child, classes, copies)
        return copied

    def _attribute(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._buffer(value)
        if type(value) in (dict, set):
            return value.copy()
        return self.sizes.attribute(name, value)

    def _parameter(self, parameter: Tensor, key: Any) -> Tensor:
        if key not in self.values:
            is_float = parameter.is_floating_point()
            value = self._random(parameter) if is_float else self._buffer(parameter)
            self.values[key] = nn.Parameter(value, requires_grad=is_float)
        return self.values[key]

    def _buffer(self, buffer: Tensor) -> Tensor:
        if buffer.is_floating_point() and id(buffer) not in self.constants:
            if id(buffer) not in self.values:
                self.values[id(buffer)] = self._random(buffer)
            return self.values[id(buffer)].clone()
        shape, dtype = self.sizes.shape(buffer), torch.float32 if buffer.is_floating_point() else buffer.dtype
        if buffer.is_meta or shape != tuple(buffer.shape):
            return torch.full(shape, 0.5 if dtype == torch.float32 else 0, dtype=dtype)
        copied: Tensor = buffer.detach().to("cpu", dtype, copy=True)
        return copied

    def _tensor_key(self, tensor: Tensor) -> Any:
        """Shape, and the values if a copy keeps them."""
        shape = self.sizes.shape(tensor)
        is_random = tensor.is_floating_point() and id(tensor) not in self.constants
        if is_random:
            return shape
        if tensor.is_meta or shape != tuple(tensor.shape):
            return shape, tensor.dtype
        try:
            return shape, tensor.dtype, tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
        except (RuntimeError, TypeError):  # a tensor subclass or another layout
            return id(tensor)

    def _random(self, tensor: Tensor) -> Tensor:
        """Values that hide no error, as zeros would; large ones repeat a prime number of values."""
        shape, period = self.sizes.shape(tensor), 65521
        count = int(torch.Size(shape).numel())
        values = torch.rand(min(count, period), generator=self.generator, dtype=torch.float32)
        values = values.repeat(-(-count // period))[:count].view(shape)
        if len(shape) < 2:
            return values * 0.5 + 0.3
        return (values - 0.5).mul(math.sqrt(12 / max(1, shape[-1])))


# --- the comparison ---------------------------------------------------------------------------------------------------


def _compare(original: Any, replaced: Any, replacement: Replacement, seeded: bool) -> Verdict:
    """Compares the copies; with random numbers of a fixed seed, or up to the first random number that is drawn."""
    methods = (getattr(type(module), replacement.forward.method) for module in (original, replaced))
    signature = inspect.Signature(list_parameters(*methods))
    try:
        x = draw(2, TOKENS, input_width(original)).requires_grad_()
        calls = [bound for call in replacement.calls(original, x) if (bound := _bind(signature, call))]
    except Exception as error:
        return Verdict(f"no input can be made: {_line(error)}")
    if not calls:
        return Verdict("its arguments have other names")
    tried: set[str] = set()
    state = torch.get_rng_state()
    for number, bound in enumerate(calls):
        by_position = bound.args, bound.kwargs
        by_name = _by_name(signature, bound) if replacement.target else by_position
        for mode in _MODES if number == 0 else _MODES[:1] if replacement.tower else _MODES[:2]:
            call = by_name if mode.training else by_position
            if mode.dtype != torch.float32:
                original.to(mode.dtype), replaced.to(mode.dtype)
                call = _cast(call, mode.dtype)
            try:
                expected = _run(original, call, mode, replacement, seeded)
            except Exception as error:
                if number == 0 and mode is _MODES[0]:
                    return Verdict(f"its own code raises {_line(error)}")
                continue
            if not seeded and not torch.equal(torch.get_rng_state(), state):
                return Verdict("random numbers are drawn")
            if not replacement.target:
                del expected["input"]  # a fused step has no use for its child's input
            for forced in (ALWAYS, NEVER) if mode.unfused and not replacement.tower else (ALWAYS,):
                _force(replaced, forced)
                try:
                    actual = _run(replaced, call, mode, replacement, seeded)
                except Exception as error:
                    return Verdict(f"its replacement raises {_line(error)}{mode.where}")
                for part, theirs in expected.items():
                    if not _is_close(actual[part], theirs, mode.tolerance):
                        return Verdict(f"its {part} {'differ' if part.endswith('s') else 'differs'}{mode.where}")
            tried |= bound.arguments.keys()
        original.float(), replaced.float()
    return Verdict(None, frozenset(tried))


def _force(module: nn.Module, forced: Any) -> None:
    for part in module.modules():
        if isinstance(part, AcceleratedModule):
            vars(part)["is_forced"] = forced


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


def _run(module: Any, call: Call, mode: _Mode, replacement: Replacement, seeded: bool) -> dict[str, Any]:
    """The outputs of a call, its gradients, its inputs afterwards and the random numbers that it draws."""
    values, spec = tree_flatten(call)
    tensors = {id(value): value for value in values if isinstance(value, Tensor)}  # one given twice stays one
    leaves = {key: value.detach().clone().requires_grad_(value.requires_grad) for key, value in tensors.items()}
    inputs = {key: leaf.clone() for key, leaf in leaves.items()}  # they may be changed in place
    args, options = spec.unflatten([inputs.get(id(value), value) for value in values])
    module.train(mode.training)
    if seeded:  # `torch.manual_seed` formats a stack for each device that isn't in use
        torch.default_generator.manual_seed(2)
    with torch.set_grad_enabled(mode.gradients != "off"), torch.autocast("cpu", torch.bfloat16, enabled=mode.autocast):
        called = module if replacement.forward.method == "forward" else getattr(module, replacement.forward.method)
        result = replacement.compared(called(*args, **options))
    drawn = torch.rand(2, dtype=torch.float32) if seeded else torch.get_rng_state()
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
    terms = [(v.float() * draw(*v.shape, seed=2).abs()).sum() for v in outputs if v.requires_grad]
    if not terms:
        return []
    gradients = torch.autograd.grad(torch.stack(terms).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(inputs, gradients, strict=True)]


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
