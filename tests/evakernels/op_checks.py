"""The checks that every op must pass, so that each family's test only has to bring its inputs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from on_device import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

import evakernels
from evakernels import backends
from evakernels.nn.linear import faster_dtypes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPCHECK_DTYPES = [
    torch.float32,
    *(pytest.param(t, marks=pytest.mark.exhaustive) for t in (torch.bfloat16, torch.float64)),
]

no_triton = pytest.mark.kernels("cpu", "nvcc")
freezes_both = pytest.mark.skipif(
    not {torch.float32, torch.bfloat16} <= faster_dtypes(),
    reason="EVAKERNELS_PROCESSOR=amd freezes float32 and bfloat16, where oneDNN has both",
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64, the same for the same seed."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cast(inputs: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if x is None else x.to(dtype) for x in inputs]


def op_files() -> dict[str, ModuleType]:
    """The test file of each file in `evakernels/ops` that has public functions, by the name of that file."""
    names = {getattr(evakernels, name).__module__.rpartition(".")[2] for name in evakernels.ops.__all__}
    return {name: import_module(f"test_{name}") for name in sorted(names) if not name.startswith("_")}


def exhaustive_but(cases: Sequence[Any], *quick: str) -> list[Any]:
    """The cases, of which all but those with these ids are for `make exhaustive`."""
    assert set(quick) <= {case.id for case in cases}
    marks = [[*case.marks, *([] if case.id in quick else [pytest.mark.exhaustive])] for case in cases]
    return [pytest.param(*case.values, id=case.id, marks=more) for case, more in zip(cases, marks, strict=True)]


@contextmanager
def served_by(op: str, implementations: dict[str, backends.Implementation]) -> Iterator[None]:
    """Within the `with` block these are all implementations of `op`, by backend."""
    previous = backends._implementations[op]
    try:
        backends._implementations[op] = implementations
        backends.choices.clear()
        yield
    finally:
        backends._implementations[op] = previous
        backends.choices.clear()


def assert_opcheck(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> None:
    """All of opcheck's utilities: schema, fake against real, autograd registration, AOT with dynamic shapes."""
    results = torch.library.opcheck(op, args)
    assert set(results.values()) == {"SUCCESS"}, results


class Recorder(TorchDispatchMode):
    """Records each operator that runs, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copied = tree_map(lambda x: x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x, args)
        self.calls.append((func, copied))
        return func(*args, **(kwargs or {}))

    def own_calls(self) -> list[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
        """Those of this library's ops."""
        return [(op, args) for op, args in self.calls if op.namespace == "evakernels"]


def record_calls(*dtypes: torch.dtype) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of this library's ops by name: of TRANSFORMED cases in these dtypes, and of optimizer steps."""
    with Recorder() as recorder, evakernels.use_backend("reference"):
        for module in op_files().values():
            for case in getattr(module, "CASES", ()):
                (ours, _), inputs = case.values
                for dtype in dtypes if case.id in module.TRANSFORMED else ():
                    given = cast(inputs, dtype)
                    with_gradients(ours, given)
                    with torch.no_grad():
                        ours(*given)
            for op, arguments in module.CALLS.items():
                if "steps" in arguments:
                    own = tree_map_only(Tensor, Tensor.clone, arguments | {"found_inf": None})
                    getattr(evakernels, op)(**own)
    calls: dict[str, list[tuple[Any, ...]]] = {}
    for overload, arguments in recorder.own_calls():
        detached = tree_map_only(Tensor, Tensor.detach, arguments)
        calls.setdefault(overload.name().partition("::")[2], []).append(detached)
    return calls


def assert_autocast_is_torchs(ours, theirs, x, dtype):
    """Of float32 it makes the same dtype; the gradient is float32 again."""
    x.requires_grad_()
    with torch.autocast(DEVICE.type, dtype=dtype):
        actual, expected = ours(x), theirs(x)
    assert actual.dtype == expected.dtype == dtype
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)
    (gradient,) = torch.autograd.grad(actual.float().square().sum(), x)
    assert gradient.dtype == torch.float32


def message_of(call: Callable[..., Any], *args: Any) -> str:
    """Type and message of the call's error, for tests in other processes."""
    try:
        call(*args)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, in float64."""
    if actual.numel() == 0:
        return 0.0
    return (actual.double() - expected.double()).abs().max().item()


def with_gradients(function, inputs, seed=0, preserve_strides=False):
    """Outputs of `function(*inputs)` and the gradients of all inputs for one fixed random cotangent an output.

    The cotangents are drawn in float64 and cast, so that runs in different dtypes see the same ones. Inputs are copied,
    and then dense and aligned, unless they are to be read `preserve_strides` in memory.
    """
    leaves = [None if t is None else t.detach() if preserve_strides else t.detach().clone() for t in inputs]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(outputs, present, cotangents)
    return [o.detach() for o in outputs], list(gradients)


def assert_as_accurate_as_torch(ours, theirs, inputs, dtype):
    """The error rule: against float64 inputs rounded to `dtype`, at most 2x torch's error forward and 3x backward.

    `theirs` computes the same thing from PyTorch's own functions; run in float64 it is the truth, run in `dtype` it is
    the yardstick. Both are given the same rounded inputs. torch's error of a single number is the largest of several
    cotangents': one alone may be small by chance.
    """
    rounded = cast(inputs, dtype)
    wide = cast(rounded, torch.float64)
    seeds = range(4 if any(t is not None and t.numel() == 1 for t in inputs) else 1)
    exact, *others = (with_gradients(theirs, wide, seed) for seed in seeds)
    yardstick, *other_yardsticks = (with_gradients(theirs, rounded, seed) for seed in seeds)
    result = with_gradients(ours, rounded)
    for place, (kind, factor) in enumerate((("output", 2), ("gradient", 3))):
        for i, (g, p, t) in enumerate(zip(result[place], yardstick[place], exact[place], strict=True)):
            assert g.shape == t.shape, (kind, i, g.shape, t.shape)
            torchs = error(p, t)
            if t.numel() == 1:
                pairs = zip(other_yardsticks, others, strict=True)
                torchs = max([torchs, *(error(peer[place][i], truth[place][i]) for peer, truth in pairs)])
            # One unit in the last place of the largest value: what rounding the exact result may cost.
            slack = torch.finfo(dtype).eps * t.abs().max().item() if t.numel() else 0.0
            message = f"{kind} {i} in {dtype}: error {error(g, t):.3g}, torch's {torchs:.3g}"
            assert error(g, t) <= factor * torchs + slack, message


def assert_deterministic(function: Callable[..., Any], inputs: Sequence[Tensor | None]) -> None:
    """Two runs are bit-equal, forward and backward."""
    assert_bit_equal(*(with_gradients(function, inputs) for _ in range(2)))


def assert_bit_equal(first, second):
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


def thread_results(call: Callable[[], Any]) -> list[Any]:
    """What a call returns with one thread, and with three."""
    if DEVICE.type != "cpu":
        pytest.skip("of the CPU: its threads")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


def assert_compiles(function: Callable[..., Any], inputs: Sequence[Tensor | None], dynamic: bool = False) -> None:
    """`torch.compile(fullgraph=True)` gives the same values and gradients. aot_eager traces without compiling C++."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    eager, traced = with_gradients(function, inputs), with_gradients(compiled, inputs)
    with torch.no_grad():
        inference = compiled(*inputs)
    inference = [inference] if isinstance(inference, Tensor) else list(inference)
    for a, b in zip(eager[0] + eager[1] + eager[0], traced[0] + traced[1] + inference, strict=True):
        torch.testing.assert_close(a, b)


def assert_parameter_dtypes(function: Callable[..., Any], inputs_of: Callable[..., Sequence[Tensor]]) -> None:
    """Each gradient has the dtype of its parameter, and all results are those of float32 parameters.

    Args:
        inputs_of: inputs in bfloat16 with a weight and a bias of these dtypes.
    """
    expected = with_gradients(function, inputs_of(torch.float32, torch.float32))
    for mix in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        inputs = inputs_of(*mix)
        outputs, gradients = with_gradients(function, inputs)
        assert [g.dtype for g in gradients] == [t.dtype for t in inputs]
        for actual, wide in zip(outputs + gradients, expected[0] + expected[1], strict=True):
            assert torch.equal(actual, wide.to(actual.dtype))


def assert_gradcheck(function: Callable[..., Any], inputs: Sequence[Tensor | None]) -> None:
    """The gradients against finite differences, in float64."""
    leaves = tuple(None if t is None else t.double().detach().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(function, leaves)
