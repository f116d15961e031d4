"""An op: a reference with its annotated signature as schema, and the backends that run it.

Torch's dispatcher runs an op; plain eager calls take a fast path (`_fast`). The backend is chosen at each call, so
`torch.compile` sees one opaque op and `use_backend` also holds in compiled code.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .. import _native, autocast, backends, triton
from .._modes import are_transforms_active, has_dual_numbers, is_transformed, needs_grad
from ._dtensors import ShardingRule, is_sharded, over_shards
from ._fast import implementation, with_fast_path

_library = torch.library.Library(backends.NAMESPACE, "DEF")
# In the ops' namespace the dispatcher would call the compiled library's kernels by device alone.
_native_library = torch.library.Library(_native.NAMESPACE, "DEF")

_decompositions: dict[Any, Callable[..., Any]] = {}
"""Functions by the operators that they replace under `as_torch_operators`."""

Check = Callable[..., tuple[Any, ...]]
"""Maps a public function's arguments to the op's, with autocast's casts, or raises; reads no tensor values."""


class Op:
    """An op as the public functions call it."""

    def __init__(
        self,
        overload: torch._ops.OpOverload,
        decomposition: Callable[..., Any],
        check: Check | None,
        check_values: Callable[..., None] | None,
        sharding: ShardingRule | None,
    ) -> None:
        self.overload = overload
        self.name = overload._schema.name.partition("::")[2]
        self.argument_names = backends.argument_names(self.name)  # compiled code can't read the schema
        self.decomposition = decomposition
        self.check = check
        self.check_values = check_values
        self.sharding = sharding
        self.public_outputs: Callable[[Any], Any] = lambda outputs: outputs
        self.takes_gradients = False
        self.function = _autograd_function(self.name, self._refuse_gradient)

    @property
    def family(self) -> str:
        """The name for errors."""
        return self.name.removesuffix("_forward").removesuffix("_backward")

    @with_fast_path
    def __call__(self, *args: Any) -> Any:
        """The op's public outputs, without tensors for backward alone."""
        if self.sharding is not None and any(is_sharded(tensor) for tensor in backends.tensors(args)):
            return over_shards(self.family, self, self.sharding, dict(zip(self.argument_names, args, strict=False)))
        return self.public_outputs(self._dispatch(self.overload, args))

    def every_output(self, *args: Any) -> Any:
        """All outputs; outputs that only backward reads are non-differentiable."""
        return self._dispatch(self.overload.overloadpacket, args)

    def _dispatch(self, operator: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self.check is not None:
            args = self.check(*args)
        # `record` can't see dual numbers that compiled code makes; its tracer can.
        is_hidden = torch.compiler.is_compiling() and has_dual_numbers()
        return self.decomposition(*args) if is_hidden else operator(*args)

    def record(self, *args: Any) -> Any:
        """The op's kernel for autograd; the decomposition runs under forward-mode differentiation and functorch."""
        if is_transformed():
            if self.check_values is not None and not are_transforms_active():  # vmap hides values
                self.check_values(*args)
            return self.decomposition(*args)
        if needs_grad(*args):
            return self.function.apply(*args, self._run_below_autograd, False)
        return self._run_below_autograd(*args)

    def _run_below_autograd(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def run(self, *args: Any) -> Any:
        """The op's kernel for all devices, with checked arguments; outputs that it doesn't compute are empty."""
        outputs = implementation(self, args)(*args)
        if type(outputs) is not tuple or not any(output is None for output in outputs):
            return outputs
        tensor = backends.first_tensor(args)
        assert tensor is not None
        empty = partial(tensor.new_empty, 0, dtype=torch.float32)
        return tuple(empty() if output is None else output for output in outputs)

    def implementation(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """The backend's function for these arguments, with checks of values and without autocast."""
        function = backends.select(self.name, args).observed(self.name)
        tensor = backends.first_tensor(args)
        without_autocast = tensor is not None and autocast.is_on(tensor.device.type)
        check_values = self.check_values
        if check_values is None and not without_autocast:
            return function

        def run(*args: Any) -> Any:
            if check_values is not None:
                check_values(*args)
            return _without_autocast(function, *args)

        return run

    def _refuse_gradient(self, ctx: Any, *grads: Any) -> Any:
        if not self.takes_gradients:
            raise RuntimeError(f"evakernels: {self.name} has no gradient")
        _refuse_second_derivative(self.family)


def define(
    reference: Callable[..., Any],
    *,
    check: Check | None = None,
    check_values: Callable[..., None] | None = None,
    fake: Callable[..., Any] | None = None,
    decomposition: Callable[..., Any] | None = None,
    exported: Callable[..., Any] | None = None,
    mutates: Sequence[str] = (),
    sharding: ShardingRule | None = None,
    reasons: backends.Reasons | None = None,
    gpu_reasons: backends.Reasons | None = None,
    triton_reasons: backends.Reasons = lambda *args, **options: [],
    cpu_launcher: _native.Launcher | None = None,
    gpu_launcher: _native.Launcher | None = None,
) -> Op:
    """Defines the operator that is named like the reference and returns its `Op`.

    Args:
        reference: the op in plain PyTorch. Its signature is the schema.
        check: checks and converts the public function's arguments.
        check_values: raises for values of tensors that no implementation accepts. It runs inside the op, where
            `torch.compile` doesn't hide values.
        fake: computes outputs without data; the reference by default.
        decomposition: the op in torch's operators, with all derivatives; the reference by default.
        exported: decomposition for exported programs and inference; it may omit outputs for backward.
        mutates: names of the arguments that are written.
        sharding: rule for DTensors; without one torch raises.
        reasons: takes arguments by name and returns why compiled kernels don't support the call.
        gpu_reasons: the same for compiled kernels on GPUs.
        triton_reasons: the same for Triton kernels; takes the first tensor, too.
        cpu_launcher: runs the op on CPUs with a compiled kernel and torch's matmuls.
        gpu_launcher: the same on GPUs.
    """
    name = reference.__name__
    schema = torch.library.infer_schema(reference, mutates_args=mutates)
    _library.define(f"{name}{schema}")
    define_kernel(f"{name}{schema}")

    decomposed = partial(_without_autocast, decomposition or reference)
    op = Op(backends.overload(name), decomposed, check, check_values, sharding)
    returns = bool(op.overload._schema.returns)
    _library.impl(name, op.run, "CompositeExplicitAutograd")
    fake_of_op = partial(_without_autocast, fake or reference) if returns else lambda *args: None
    torch.library.register_fake(f"{backends.NAMESPACE}::{name}", fake_of_op, lib=_library)
    if returns:
        _library.impl(name, op.record, "Autograd")
    backends.register(name, "reference", reference)
    triton.register(name, backends.family(name), triton_reasons)
    _native.register(name, reasons, gpu_reasons, cpu_launcher, gpu_launcher)

    def in_torch_operators(*args: Any) -> Any:
        is_eager = not torch.compiler.is_compiling()
        if exported is None or (is_eager and (needs_grad(*args) or is_transformed())):
            return decomposed(*args)
        return _without_autocast(exported, *args)

    _decompositions[op.overload] = in_torch_operators
    _decompositions[op.overload.overloadpacket] = decomposed  # for `every_output`
    return op


def define_kernel(schema: str) -> None:
    """Defines an operator of the compiled library."""
    _native_library.define(schema)
    name = schema.partition("(")[0]
    _native_library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # torch's own takes time to do nothing


def differentiable(
    forward: Op,
    backward: Op | None,
    *,
    setup_context: Callable[..., None],
    formula: Callable[..., Any],
    returned: int | None = None,
) -> None:
    """Gives `forward` the gradient `formula`, which calls `backward`; a second derivative raises.

    Args:
        forward, backward: the ops; None for a formula in torch's operators.
        setup_context: as for `torch.library.register_autograd`; without `backward` it saves the inputs, too.
        formula: maps `ctx` and the gradients of the outputs to those of leading arguments, with any placeholder for
            arguments that need no gradient.
        returned: number of outputs of the public function; None for all. The others are non-differentiable.
    """
    if returned is not None:
        forward.public_outputs = lambda outputs: outputs[0] if returned == 1 else outputs[:returned]
    if backward is None:
        formula = _differentiable_once(forward.family, formula)
    else:
        backward.takes_gradients = True
    forward.function = _autograd_function(forward.family, formula, setup_context, returned)


def _differentiable_once(family: str, formula: Callable[..., Any]) -> Callable[..., Any]:
    refusing = _autograd_function(family, lambda ctx, *grads: _refuse_second_derivative(family))

    def once(ctx: Any, *grads: Any) -> Any:
        # A constant upstream gradient needs none, but the saved inputs do: their second derivative isn't zero.
        if torch.is_grad_enabled() and needs_grad(*grads, *ctx.saved_tensors):
            return refusing.apply(*grads, *ctx.saved_tensors, lambda *_: formula(ctx, *grads), False)
        return formula(ctx, *grads)

    return once


def _refuse_second_derivative(family: str) -> None:
    raise RuntimeError(
        f"evakernels: {family} has no second derivative; torch's own operators have one: make the forward "
        "pass under `with evakernels.as_torch_operators():`"
    )


def _autograd_function(
    name: str,
    formula: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    returned: int | None = None,
) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        """Takes the op's arguments, the function to run, and whether to return the public outputs only."""

        @staticmethod
        def forward(ctx: Any, *args_and_options: Any) -> Any:
            *args, run, only_public = args_and_options
            outputs = run(*args)
            if returned is not None and not only_public:
                ctx.mark_non_differentiable(*outputs[returned:])
            if setup_context is not None:
                setup_context(ctx, args, outputs)
            if returned is None or not only_public:
                return outputs
            return outputs[0] if returned == 1 else outputs[:returned]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            needed = ctx.needs_input_grad
            gradients = [None] * len(needed)
            for i, gradient in enumerate(formula(ctx, *grads[:returned])):
                if needed[i]:
                    gradients[i] = gradient
            return tuple(gradients)

    return type(name, (Function,), {})  # autograd graphs show the name


class as_torch_operators(TorchFunctionMode):
    """Decomposes every op into torch's operators inside the `with` block.

    For second derivatives, and for `torch.export`, ONNX and other tools: exported programs run without this library,
    and attention is `torch.nn.functional.scaled_dot_product_attention`.

    Examples:
        >>> with torch.no_grad(), evakernels.as_torch_operators():
        ...     program = torch.export.export(evakernels.nn.LayerNorm(8), (torch.ones(2, 8),))
        >>> "evakernels" in str(program.graph)
        False
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _decompositions.get(func, func)(*args, **(kwargs or {}))


def _without_autocast(function: Callable[..., Any], *args: Any) -> Any:
    """Runs the function without autocast: the check has cast the arguments."""
    tensor = backends.first_tensor(args)
    if tensor is None or not autocast.is_on(tensor.device.type):
        return function(*args)
    with torch.autocast(tensor.device.type, enabled=False):
        return function(*args)
