"""Whether a forward does what the one whose place it takes does: both run on small random inputs, on a copy."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from evakernels.dropin import _swap
from evakernels.dropin._gate import on_trial
from evakernels.dropin._rule import Call, Rule

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""The largest difference that passes, of the largest value: torch's sums have another order, which 16 bits show."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Trials:
    """Tries modules, those that are built alike once."""

    def __init__(self) -> None:
        self._known: dict[Any, str | None] = {}

    def difference(self, module: nn.Module, cls: type, rule: Rule) -> str | None:
        """How the rule's forward differs from that of `cls`, the module's own class; None if in nothing."""
        key = rule.forward, _build_of(module)
        if key not in self._known:
            self._known[key] = _difference(module, cls, rule)
        return self._known[key]


def _build_of(module: nn.Module) -> Any:
    """What two modules have in common that do the same to the shape of their parameters."""
    return tuple((name, type(m), _attributes(m)) for name, m in module.named_modules())


def _attributes(module: nn.Module) -> Any:
    held = {**module._parameters, **module._buffers}
    shapes = tuple((name, None if tensor is None else tensor.shape) for name, tensor in held.items())
    plain = (bool, int, float, str, tuple, list, type(None))
    own = ((name, value) for name, value in vars(module).items() if not name.startswith("_") and name != "training")
    return shapes, tuple((name, repr(value) if isinstance(value, plain) else id(value)) for name, value in own)


def _difference(module: nn.Module, cls: type, rule: Rule) -> str | None:
    if any(type(p) is not nn.Parameter for p in module.parameters()):
        return "its parameters aren't plain tensors, as those of a sharded model; accelerate it before that"
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        try:
            own = _copy(module)
        except Exception as error:
            return f"no copy of it can be made: {_line(error)}"
        return next((found for s in _SETTINGS if (found := _differs(own, cls, rule, *s)) is not None), None)


_SETTINGS = (
    (torch.float32, False),
    (torch.float64, False),
    (torch.float32, True),
    (torch.bfloat16, False),
    (torch.float16, False),
)
"""Dtype of the parameters, and whether under autocast."""


def _differs(own: nn.Module, cls: type, rule: Rule, dtype: torch.dtype, autocast: bool) -> str | None:
    own = copy.deepcopy(own).to(dtype)
    new = copy.deepcopy(own)
    _swap.set_class(new, _swap.served_class(cls, rule.forward))
    tolerance = TOLERANCES[torch.bfloat16 if autocast else dtype]
    where = f"in {str(dtype).removeprefix('torch.')}{' under autocast' if autocast else ''}"
    try:
        calls = _calls(rule, own, dtype)
    except Exception as error:
        return f"no input for it can be made: {_line(error)}"
    for number, call in enumerate(calls):
        for training, graph in product((False, True), (True, False)):
            options = {"training": training, "graph": graph, "autocast": autocast}
            try:
                expected = _run(own, call, **options)
            except Exception as error:
                if number == 0 and dtype == torch.float32:
                    return f"its own code raises {_line(error)}"
                continue
            found = _differs_from(expected, partial(_run, new, call, **options), tolerance)
            if found is not None:
                return f"{found} {where}{' in training' if training else ''}"
    return None


def _differs_from(expected: dict[str, Any], run: Callable[[], dict[str, Any]], tolerance: float) -> str | None:
    """With all steps fused, and with what runs where that isn't worth it."""
    for served in (on_trial, nullcontext):
        try:
            with served():
                actual = run()
        except Exception as error:
            return f"the op's code raises {_line(error)}"
        part = _compare(actual, expected, tolerance)
        if part is not None:
            return f"{part} {'differ' if part.endswith('s') else 'differs'}"
    return None


def _line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:100]}" if text else type(error).__name__


def _copy(module: nn.Module) -> nn.Module:
    """A copy as it was before `accelerate`, without hooks, of random parameters: a zero hides what it multiplies."""
    own: nn.Module = copy.deepcopy(module)
    if any(p.is_meta for p in own.parameters()):
        own = own.to_empty(device="cpu")
        for buffer in own.buffers():
            buffer.zero_()
    with torch.no_grad():
        for part in own.modules():
            for hooks in _HOOKS:
                getattr(part, hooks).clear()
            original = _swap.original_class(_swap.own_class(part))
            if original is not None:
                _swap.set_class(part, original)
        for parameter in own.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_().copy_(_values(parameter))
    return own


def _values(parameter: Tensor) -> Tensor:
    if parameter.dim() < 2:
        return torch.rand_like(parameter) * 0.5 + 0.3
    return torch.randn_like(parameter).div(max(1, parameter.shape[-1]) ** 0.5)


def _calls(rule: Rule, module: nn.Module, dtype: torch.dtype) -> list[Call]:
    torch.manual_seed(1)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return rule.calls(module, torch.randn(2, 20, _width(module), device=device, dtype=dtype, requires_grad=True))


def _width(module: nn.Module) -> int:
    """Channels of a module's input: those of a matrix of its own, or of the first layer that it holds."""
    for parameter in module.parameters(recurse=False):
        if parameter.dim() == 2:
            return int(parameter.shape[-1])
    for part in module.modules():
        width = getattr(part, "in_features", None) or getattr(part, "normalized_shape", (None,))[-1]
        if isinstance(width, int):
            return width
    return next((p.shape[-1] for p in module.parameters() if p.dim() > 0), 16)


def _run(module: nn.Module, call: Call, training: bool, graph: bool, autocast: bool) -> dict[str, Any]:
    """All that a call makes: its outputs, the gradients, what it changed, the random numbers that it drew."""
    leaves, spec = tree_flatten(call)
    own: dict[int, Tensor] = {}  # the same tensor stays one
    for leaf in leaves:
        if isinstance(leaf, Tensor) and id(leaf) not in own:
            own[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
    args, options = spec.unflatten([own.get(id(leaf), leaf) for leaf in leaves])
    tensors = list(own.values())
    before = [leaf.detach().clone() for leaf in tensors]
    device = tensors[0].device.type
    torch.manual_seed(2)
    with torch.set_grad_enabled(graph), torch.autocast(device, torch.bfloat16, enabled=autocast):
        outputs, shape = tree_flatten(module.train(training)(*args, **options))
    drawn = torch.rand(2, device=device)
    given = [leaf for leaf in tensors if leaf.requires_grad]
    wanted = [*given, *(p for p in module.parameters() if p.requires_grad)]
    return {
        "the form of its output": (shape, [value if not isinstance(value, Tensor) else None for value in outputs]),
        "its output": [value.detach() for value in outputs if isinstance(value, Tensor)],
        "what it makes of its input": [a.detach() - b for a, b in zip(tensors, before, strict=True)],
        "its buffers": [buffer.detach().clone() for buffer in module.buffers()],
        "the random numbers that it draws": [drawn],
        "its gradients": _gradients([v for v in outputs if isinstance(v, Tensor)], wanted) if graph else [],
    }


def _gradients(outputs: list[Tensor], wanted: list[Tensor]) -> list[Tensor]:
    """Of a sum in which every output has a weight of its own."""
    torch.manual_seed(3)
    terms = [(v.float() * torch.rand(v.shape, device=v.device)).sum() for v in outputs if v.requires_grad]
    if not terms:
        return []
    found = torch.autograd.grad(torch.stack(terms).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


def _compare(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> str | None:
    for part, theirs in expected.items():
        ours = actual[part]
        if part == "the form of its output":
            if ours != theirs:
                return part
        elif len(ours) != len(theirs) or any(
            a.dtype != b.dtype or a.shape != b.shape for a, b in zip(ours, theirs, strict=True)
        ):
            return f"the dtype or shape of {part}"
        elif theirs:
            largest = max(float(b.abs().max()) if b.numel() else 0.0 for b in theirs)
            for a, b in zip(ours, theirs, strict=True):
                if not torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance * largest, equal_nan=True):
                    return part
    return None
