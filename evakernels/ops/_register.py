"""How an op comes into being: one schema, a fake, a reference, and whatever the compiled library adds.

The schema stands here once and serves two namespaces: `evakernels`, whose ops pick a backend when they run, and
`evakernels_native`, whose kernels the compiled library fills in. Because the choice is made inside the op, it is one
opaque boundary for `torch.compile`, and `use_backend` also holds in compiled code.

Torch's way from a call to an op that is written in Python, and to its gradient, takes longer than a small norm itself.
So what `define` returns goes past the dispatcher where nobody could tell: see `Op`.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode

from evakernels import _native, backends, triton
from evakernels.ops import _autocast
from evakernels.ops._eager import is_plain, wants_gradient

_library = torch.library.Library("evakernels", "DEF")
_native_library = torch.library.Library("evakernels_native", "DEF")

_NATIVE_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_NATIVE_DEVICES = {"cuda": "a GPU", "cpu": "a CPU"}
_references: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


class Op:
    """An op as the public functions call it.

    In plain eager mode a call runs the implementation at once, inside an `autograd.Function` of its own if a gradient
    is wanted. Compilers, modes, transforms, subclasses of tensors and the profiler get the op itself, `overload`.
    """

    def __init__(self, overload: torch._ops.OpOverload, run: Callable[..., Any]) -> None:
        self.overload = overload
        self.run = run
        self.function: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any) -> Any:
        if not is_plain(args):
            return self.overload(*args)
        if not wants_gradient(args):
            return self.run(*args)
        return self.overload(*args) if self.function is None else self.function.apply(*args)


def define(
    name: str,
    signature: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None,
    check: Callable[..., None] | None = None,
    gpu_reasons: backends.Reasons | None = None,
) -> Op:
    """Defines `torch.ops.evakernels.<name>` and returns what calls it.

    `signature` is the schema without the name, `reference` its meaning, `fake` the same on tensors without data
    (`None` for an op that only writes into its arguments). `check` raises for values that no implementation accepts; it
    sees them when the op runs, which a check in front of the op can't under `torch.compile`. `gpu_reasons`, given the
    arguments, tells why the compiled kernels for GPUs can't serve them.
    """
    _library.define(f"{name}{signature}")
    _native_library.define(f"{name}{signature}")

    def run(*args: Any) -> Any:
        if check is not None:
            check(*args)
        chosen = backends.select(name, args)
        backends.observe(name, chosen.backend)
        function = chosen.function
        tensor = backends.first_tensor(args)
        if tensor is None or not _autocast.is_on(tensor.device.type):
            return function(*args)
        # The public function has made autocast's casts already; left on, it would reach into the implementation.
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"evakernels::{name}", fake or _returns_nothing, lib=_library)
    backends.register(name, "reference", reference)
    triton.register(name)
    for device in _NATIVE_DEVICES:
        backends.register(name, device, _native_function(name), _native_reasons(name, device, gpu_reasons), device)
    op: torch._ops.OpOverload = getattr(torch.ops.evakernels, name).default
    _references[op] = reference
    return Op(op, run)


class as_torch_operators(TorchFunctionMode):
    """In its `with` block every op runs as its reference, in torch's own operators, and leaves no trace of its name.

    For `torch.export` and other tools that look into a program: what they write runs without this library.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _references.get(func, func)(*args, **(kwargs or {}))


def differentiable(
    forward: Op,
    backward: Op,
    *,
    setup_context: Callable[..., None],
    formula: Callable[..., Any],
) -> None:
    """Gives `forward` the gradient `formula`, which calls `backward`; a second derivative is refused."""
    torch.library.register_autograd(forward.overload, formula, setup_context=setup_context, lib=_library)
    family = forward.overload.name().removeprefix("evakernels::").removesuffix("_forward")

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"evakernels: {family} has no second derivative; differentiate the reference instead")

    torch.library.register_autograd(backward.overload, refuse, lib=_library)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = forward.run(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return formula(ctx, *grads)

    Function.__name__ = f"{family}_backward"
    forward.function = Function


def optional_gradient(gradient: torch.Tensor, present: bool) -> torch.Tensor | None:
    """Ops return an empty tensor in the place of a gradient that doesn't exist; autograd wants None there."""
    return gradient if present else None


def _returns_nothing(*args: Any) -> None:
    return None


def _native_function(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.evakernels_native, name).default
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if not written:
        return cast(Callable[..., Any], op)

    def run(*args: Any) -> Any:
        result = op(*args)
        # The kernel writes through pointers; autograd must see that what it may have saved has changed.
        torch.autograd.graph.increment_version(backends.tensors([args[i] for i in written]))
        return result

    return run


def _native_reasons(name: str, device: str, gpu_reasons: backends.Reasons | None) -> backends.Reasons:
    def reasons(*args: Any) -> list[str]:
        if not _native.LOADED:
            return [f"the compiled library is not loaded: {_native.REASON}"]
        if not _native.implemented(name, device):
            return [f"{name} has no compiled {device.upper()} kernel"]
        first, found = None, []
        for arg in args:
            # Asked at every call of an op: no generators, no sets, no lists that stay empty.
            for tensor in arg if isinstance(arg, list) else (arg,):
                if not isinstance(tensor, torch.Tensor):
                    continue
                first = tensor if first is None else first
                dtype = tensor.dtype
                if dtype not in _NATIVE_DTYPES and dtype.is_floating_point:
                    found.append(f"{dtype} is not one of float32, bfloat16, float16")
        if first is None:
            return [] if device != "cuda" or torch.cuda.is_available() else ["there is no GPU here"]
        if first.device.type != device:
            found.insert(0, f"the tensors are on {first.device}, not on {_NATIVE_DEVICES[device]}")
        if gpu_reasons is not None and _native.runs_gpu_kernels(device):
            found += gpu_reasons(*args)
        return list(dict.fromkeys(found)) if found else found

    return reasons
