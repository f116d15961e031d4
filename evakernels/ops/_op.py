"""What an op is: a reference, whose annotated signature is its schema, and whatever serves it better.

A call in plain eager mode is resolved once. What is asked about it, from the checks of its arguments to the choice of a
backend, depends on dtypes, shapes, devices, numbers and a few switches of the process; the answer, a `Plan`, is kept by
exactly those. Any later call that is like it costs one look-up and runs.

The schema stands in two namespaces: `evakernels`, whose ops choose a backend when they run, and `evakernels_native`,
whose kernels the compiled library fills in. Because the choice is made inside the op, it is one opaque boundary for
`torch.compile`, and `use_backend` also holds in compiled code, where that runs the op anew.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _any_requires_grad, is_grad_enabled
from torch._C._functorch import is_legacy_batchedtensor
from torch._library.autograd import Info, make_autograd_impl
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode

from evakernels import _native, backends, triton
from evakernels.ops import _autocast, _shards
from evakernels.ops._eager import has_dual_numbers, is_transformed, is_watched, likeness, wants_gradient
from evakernels.ops._sharding import Rule, over_shards

_library = torch.library.Library("evakernels", "DEF")
_native_library = torch.library.Library("evakernels_native", "DEF")

_composed: dict[Any, Callable[..., Any]] = {}
"""What runs in the place of an op under `as_torch_operators`."""

MAX_PLANS = 1 << 12
"""Of an op; at more, such as of captions packed to ever other lengths, all are forgotten and made anew."""

Check = Callable[..., tuple[Any, ...]]
"""Maps the arguments of a public function to those that the op takes, with autocast's casts made, or raises. What it
says may depend on their types, dtypes, shapes and devices, and on numbers; not on what tensors hold."""


class Plan(NamedTuple):
    """How calls that are like one another run."""

    run: Callable[..., Any]
    changes: tuple[tuple[int, Any], ...]
    """What the check made of arguments: the number of each, with the dtype of a tensor or the value of another."""

    def changed(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found = list(args)
        for i, value in self.changes:
            found[i] = found[i].to(value) if isinstance(value, torch.dtype) else value
        return tuple(found)


class Op:
    """An op as the public functions call it.

    In plain eager mode a call runs the implementation at once, inside an `autograd.Function` of its own if a gradient
    is wanted. Compilers, modes, transforms and subclasses of tensors get the op itself, `overload`.

    The op's gradient is known in reverse mode alone, once. So under forward-mode differentiation and functorch's
    transforms it runs as its reference, which torch differentiates and maps as often as is asked.
    """

    def __init__(
        self,
        overload: torch._ops.OpOverload,
        seen_through: Callable[..., Any],
        check: Check | None,
        check_values: Callable[..., None] | None,
        rule: Rule | None,
    ) -> None:
        self.overload = overload
        self.name = overload._schema.name.removeprefix("evakernels::")
        self.seen_through = seen_through
        self.check = check
        self.check_values = check_values
        self.rule = rule
        self.returned: int | None = None
        self.plans: dict[tuple[Any, ...], Plan] = backends.kept_for(self.name)
        self.recording: Callable[..., Any] | None = None
        self.recording_all: Callable[..., Any] | None = None
        self.recorded = make_autograd_impl(overload, Info(None, None))

    def __call__(self, *args: Any) -> Any:
        """The op's outputs, of which those behind the first `returned` are for its backward pass alone."""
        key = None if is_watched() else likeness(args)
        if key is None:
            if self.rule is not None and any(_shards.is_sharded(tensor) for tensor in backends.tensors(args)):
                return over_shards(self.name.removesuffix("_forward"), self, self.rule, args)
            return self._first(self._dispatched(args))
        plan = self.plans.get(key) or self._planned(args, key)
        if plan.changes:
            args = plan.changed(args)
        if is_grad_enabled() and _any_requires_grad(*args):
            return self.overload(*args) if self.recording is None else self.recording(*args, plan.run)
        return self._first(plan.run(*args))

    def _first(self, outputs: Any) -> Any:
        count = self.returned
        return outputs if count is None else outputs[0] if count == 1 else outputs[:count]

    def run(self, *args: Any) -> Any:
        """What the dispatcher calls: arguments have been checked, or come from compiled code."""
        key = likeness(args)
        if key is None:
            return self._resolved(args)(*args)
        key = "dispatched", *key
        plan = self.plans.get(key) or self._kept(key, Plan(self._resolved(args), ()))
        return plan.run(*args)

    def _dispatched(self, args: tuple[Any, ...]) -> Any:
        if self.check is not None:
            args = self.check(*args)
        # Of dual numbers that compiled code itself makes only its tracer knows.
        hidden = torch.compiler.is_compiling() and has_dual_numbers()
        return self.seen_through(*args) if hidden else self.overload(*args)

    def _planned(self, args: tuple[Any, ...], key: tuple[Any, ...]) -> Plan:
        checked = args if self.check is None else self.check(*args)
        changes = tuple(
            (i, after.dtype if isinstance(after, Tensor) else after)
            for i, (before, after) in enumerate(zip(args, checked, strict=True))
            if after is not before
        )
        on_known_device = all(tensor.is_cpu or tensor.is_cuda for tensor in backends.tensors(checked))
        return self._kept(key, Plan(self._resolved(checked) if on_known_device else self.overload, changes))

    def _kept(self, key: tuple[Any, ...], plan: Plan) -> Plan:
        if len(self.plans) >= MAX_PLANS:
            self.plans.clear()
        self.plans[key] = plan
        return plan

    def _resolved(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """The implementation that serves calls like this, with whatever has to happen around it."""
        function = backends.select(self.name, args).observed(self.name)
        tensor = backends.first_tensor(args)
        without_autocast = tensor is not None and _autocast.is_on(tensor.device.type)
        check_values = self.check_values
        if check_values is None and not without_autocast:
            return function

        def run(*args: Any) -> Any:
            if check_values is not None:
                check_values(*args)
            return _without_autocast(function, args)

        return run

    def differentiated(self, keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        """What the dispatcher calls for autograd."""
        if not is_transformed():
            return self.recorded(keyset, *args)
        if self.check_values is not None and not torch._C._are_functorch_transforms_active():  # vmap hides values
            self.check_values(*args)
        return self.seen_through(*args)


def define(
    reference: Callable[..., Any],
    *,
    check: Check | None = None,
    check_values: Callable[..., None] | None = None,
    fake: Callable[..., Any] | None = None,
    composed: Callable[..., Any] | None = None,
    lowered: Callable[..., Any] | None = None,
    mutates: Sequence[str] = (),
    rule: Rule | None = None,
    gpu_reasons: backends.Reasons | None = None,
) -> Op:
    """Defines `torch.ops.evakernels.<name of the reference>` and returns what calls it.

    Args:
        reference: the op's meaning, in plain PyTorch. Its signature is the schema, its name the op's.
        check: of what the public function is given, which it passes on as it is.
        check_values: raises for what tensors hold that no implementation accepts. It sees them when the op runs, which
            a check in front of the op can't under `torch.compile`.
        fake: the reference on tensors without data, where it would ask them for some, or make others.
        composed: stands for the reference where torch sees through the op, unless that is itself made of operators
            that have all derivatives.
        lowered: stands for both in programs, where one of torch's own operators, of one derivative alone, is better. It
            may leave out the outputs that are for the backward pass.
        mutates: the arguments that are written.
        rule: how it runs on DTensors. Without one they get torch's error, that it knows no way to cut the op.
        gpu_reasons: given the arguments, why the compiled kernels for GPUs can't serve them.
    """
    name = reference.__name__
    schema = torch.library.infer_schema(reference, mutates_args=mutates)
    _library.define(f"{name}{schema}")
    _native_library.define(f"{name}{schema}")
    _native_library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # torch's own takes time to do nothing

    def seen_through(*args: Any) -> Any:
        return _without_autocast(composed or reference, args)

    def without_data(*args: Any) -> Any:
        return _without_autocast(fake or reference, args)

    def in_torch_operators(*args: Any) -> Any:
        eager = not torch.compiler.is_compiling()
        if lowered is None or (eager and (wants_gradient(args) or is_transformed())):
            return seen_through(*args)
        return _without_autocast(lowered, args)

    op = Op(getattr(torch.ops.evakernels, name).default, seen_through, check, check_values, rule)
    returns = bool(op.overload._schema.returns)
    _library.impl(name, op.run, "CompositeExplicitAutograd")
    fake_of_op = without_data if returns else lambda *args: None
    torch.library.register_fake(f"evakernels::{name}", fake_of_op, lib=_library)
    backends.register(name, "reference", reference)
    triton.register(name)
    _native.register(name, gpu_reasons)
    _composed[op.overload] = in_torch_operators
    if returns:
        _library.impl(name, op.differentiated, "Autograd", with_keyset=True)
    return op


def every_output(op: Op) -> Op:
    """What calls `op`, which is `differentiable`, and returns all of its outputs. Those behind have no gradient.

    Under `as_torch_operators` it is never what the op is `lowered` to, which leaves these out.
    """
    twin = copy.copy(op)  # with the same plans
    twin.overload = op.overload.overloadpacket
    twin.returned, twin.recording = None, op.recording_all
    _composed[twin.overload] = op.seen_through
    return twin


class as_torch_operators(TorchFunctionMode):
    """In its `with` block every op runs as its reference, in torch's own operators, and leaves no trace of its name.

    For `torch.export`, ONNX and other tools that look into a program: what they write runs without this library.
    Attention is `torch.nn.functional.scaled_dot_product_attention` there, of which they have kernels of their own. And
    for second derivatives: of an eager forward pass in the block torch has all of them.

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
    returned: int | None = None,
) -> None:
    """Gives `forward` the gradient `formula`, which calls `backward`; a second derivative is refused.

    `formula` may return fewer gradients than there are arguments: of those behind there are none. In the place of a
    gradient that doesn't exist or that nobody wants, which `ctx.needs_input_grad` tells, it may return anything, such
    as the empty tensor that `backward` returns there. `returned` is how many outputs a caller gets, if not all:
    autograd keeps books of each. Those behind have no gradient.
    """
    forward.returned = returned
    count = len(forward.overload._schema.arguments)

    def gradient(ctx: Any, *grads: Any) -> Any:
        grads = grads[:returned]
        for grad in grads:
            if grad is not None and is_legacy_batchedtensor(grad):
                # Several cotangents at once (`is_grads_batched`), by an older vmap of torch that no question tells of:
                # any mode has the op called itself, which is then called with one after the other.
                with BaseTorchFunctionMode():
                    return filled(ctx, formula(ctx, *grads))
        return filled(ctx, formula(ctx, *grads))

    def filled(ctx: Any, found: tuple[Any, ...]) -> tuple[Any, ...]:
        wanted = (x if wants else None for x, wants in zip(found, ctx.needs_input_grad, strict=False))
        return *wanted, *[None] * (count - len(found))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if returned is not None:
            ctx.mark_non_differentiable(*output[returned:])
        setup_context(ctx, inputs, output)

    forward.recorded = make_autograd_impl(forward.overload, Info(gradient, setup))
    family = forward.name.removesuffix("_forward")

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"evakernels: {family} has no second derivative; torch's own operators have one: make the forward pass "
            "under `with evakernels.as_torch_operators():`"
        )

    backward.recorded = make_autograd_impl(backward.overload, Info(refuse, None))

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args_and_run: Any) -> Any:
            *args, run = args_and_run
            output = run(*args)
            setup_context(ctx, args, output)
            return forward._first(output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return *gradient(ctx, *grads), None

    class FunctionOfAll(Function):
        @staticmethod
        def forward(ctx: Any, *args_and_run: Any) -> Any:
            *args, run = args_and_run
            output = run(*args)
            setup(ctx, tuple(args), output)
            return output

    Function.__name__ = FunctionOfAll.__name__ = f"{family}_backward"
    # Past `Function.apply` of Python, which asks about transforms of functorch: none is at work here.
    forward.recording = super(torch.autograd.Function, Function).apply
    forward.recording_all = super(torch.autograd.Function, FunctionOfAll).apply


def _without_autocast(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The check has made autocast's casts already; left on, it would reach into the implementation."""
    tensor = backends.first_tensor(args)
    if tensor is None or not _autocast.is_on(tensor.device.type):
        return function(*args)
    with torch.autocast(tensor.device.type, enabled=False):
        return function(*args)
