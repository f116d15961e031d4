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
from torch._C._functorch import is_legacy_batchedtensor
from torch._library.autograd import Info, make_autograd_impl
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode

from evakernels import _native, backends, triton
from evakernels.ops import _autocast
from evakernels.ops._eager import has_dual_numbers, is_plain, is_transformed, wants_gradient

_library = torch.library.Library("evakernels", "DEF")
_native_library = torch.library.Library("evakernels_native", "DEF")

_NATIVE_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_NATIVE_DEVICES = {"cuda": "a GPU", "cpu": "a CPU"}
_composed: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
"""What runs in the place of an op where torch itself shall see through it."""


class Op:
    """An op as the public functions call it.

    In plain eager mode a call runs the implementation at once, inside an `autograd.Function` of its own if a gradient
    is wanted. Compilers, modes, transforms, subclasses of tensors and the profiler get the op itself, `overload`.

    The op's gradient is known in reverse mode alone, once. So under forward-mode differentiation and functorch's
    transforms it runs as its reference, which torch differentiates and maps as often as is asked.
    """

    def __init__(
        self, overload: torch._ops.OpOverload, run: Callable[..., Any], seen_through: Callable[..., Any]
    ) -> None:
        self.overload = overload
        self.run = run
        self.seen_through = seen_through
        self.function: type[torch.autograd.Function] | None = None
        self.recorded = make_autograd_impl(overload, Info(None, None))

    def __call__(self, *args: Any) -> Any:
        if not is_plain(args):
            # Of dual numbers that compiled code itself makes only its tracer knows.
            hidden = torch.compiler.is_compiling() and has_dual_numbers()
            return self.seen_through(*args) if hidden else self.overload(*args)
        if not wants_gradient(args):
            return self.run(*args)
        return self.overload(*args) if self.function is None else self.function.apply(*args)


def define(
    name: str,
    signature: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None,
    composed: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    gpu_reasons: backends.Reasons | None = None,
) -> Op:
    """Defines `torch.ops.evakernels.<name>` and returns what calls it.

    `signature` is the schema without the name, `reference` its meaning, `fake` the same on tensors without data
    (`None` for an op that only writes into its arguments). `composed` stands for the reference where torch sees through
    the op, unless that is itself made of operators that have all derivatives. `check` raises for values that no
    implementation accepts; it sees them when the op runs, which a check in front of the op can't under `torch.compile`.
    `gpu_reasons`, given the arguments, tells why the compiled kernels for GPUs can't serve them.
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
        return _without_autocast(function, args)

    def seen_through(*args: Any) -> Any:
        return _without_autocast(composed or reference, args)

    def differentiated(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if not is_transformed():
            return op.recorded(keyset, *args)
        if check is not None and not torch._C._are_functorch_transforms_active():  # of these, vmap hides values
            check(*args)
        return seen_through(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"evakernels::{name}", fake or _returns_nothing, lib=_library)
    backends.register(name, "reference", reference)
    triton.register(name)
    for device in _NATIVE_DEVICES:
        backends.register(name, device, _native_function(name), _native_reasons(name, device, gpu_reasons), device)
    op = Op(getattr(torch.ops.evakernels, name).default, run, seen_through)
    _composed[op.overload] = seen_through
    if fake is not None:
        _library.impl(name, differentiated, "Autograd", with_keyset=True)
    return op


class as_torch_operators(TorchFunctionMode):
    """In its `with` block every op runs as its reference, in torch's own operators, and leaves no trace of its name.

    For `torch.export` and other tools that look into a program: what they write runs without this library. And for
    second derivatives: of a forward pass in the block torch has all of them.

    Examples:
        >>> with torch.no_grad(), evakernels.as_torch_operators():
        ...     program = torch.export.export(evakernels.nn.LayerNorm(8), (torch.ones(2, 8),))
        >>> "evakernels" in str(program.graph)
        False
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _composed.get(func, func)(*args, **(kwargs or {}))


def differentiable(
    forward: Op,
    backward: Op,
    *,
    setup_context: Callable[..., None],
    formula: Callable[..., Any],
) -> None:
    """Gives `forward` the gradient `formula`, which calls `backward`; a second derivative is refused."""

    def gradient(ctx: Any, *grads: Any) -> Any:
        if not any(isinstance(grad, torch.Tensor) and is_legacy_batchedtensor(grad) for grad in grads):
            return formula(ctx, *grads)
        # Several cotangents at once (`is_grads_batched`), by an older vmap of torch that no question tells of: any mode
        # has the op called itself, which is then called with one after the other.
        with BaseTorchFunctionMode():
            return formula(ctx, *grads)

    forward.recorded = make_autograd_impl(forward.overload, Info(gradient, setup_context))
    family = forward.overload.name().removeprefix("evakernels::").removesuffix("_forward")

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"evakernels: {family} has no second derivative; torch's own operators have one: make the forward pass "
            "under `with evakernels.as_torch_operators():`"
        )

    backward.recorded = make_autograd_impl(backward.overload, Info(refuse, None))

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = forward.run(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradient(ctx, *grads)

    Function.__name__ = f"{family}_backward"
    forward.function = Function


def optional_gradient(gradient: torch.Tensor, present: bool) -> torch.Tensor | None:
    """Ops return an empty tensor in the place of a gradient that doesn't exist; autograd wants None there."""
    return gradient if present else None


def _without_autocast(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The public function has made autocast's casts already; left on, it would reach into the implementation."""
    tensor = backends.first_tensor(args)
    if tensor is None or not _autocast.is_on(tensor.device.type):
        return function(*args)
    with torch.autocast(tensor.device.type, enabled=False):
        return function(*args)


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
        elif device == "cuda" and (reason := _native.why_not_on_gpu(first.device.index)):
            found.insert(0, reason)
        if gpu_reasons is not None and _native.runs_gpu_kernels(device):
            found += gpu_reasons(*args)
        return list(dict.fromkeys(found)) if found else found

    return reasons
