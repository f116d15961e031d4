"""Forward-mode derivatives and functorch's transforms of every op, in float64, beside the same of torch's functions."""

from functools import partial

import pytest
import torch
from op_checks import op_files, randn
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import evakernels


def of_tensors(function, inputs):
    """`function` of its inputs but those that are None; torch's attention runs on the kernel with all derivatives."""
    where = [i for i, x in enumerate(inputs) if x is not None]

    def call(*given):
        found = [None] * len(inputs)
        for i, x in zip(where, given, strict=True):
            found[i] = x
        with sdpa_kernel(SDPBackend.MATH):
            return function(*found)

    return call


def cases():
    """By name: our function, torch's, and inputs. A test file's TRANSFORMED names its cases; without it all count."""
    for name, module in op_files().items():
        for case in getattr(module, "CASES", ()):
            (ours, theirs), inputs = case.values
            given = tuple(x for x in inputs if x is not None)
            if case.id in getattr(module, "TRANSFORMED", [case.id]) and all(x.numel() for x in given):
                yield f"{name}-{case.id}", of_tensors(ours, inputs), of_tensors(theirs, inputs), given


CASES = {name: tuple(case) for name, *case in cases()}
every_op = pytest.mark.parametrize(("ours", "theirs", "given"), CASES.values(), ids=CASES)


def tangents(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(randn(*t.shape, seed=50 + i) for i, t in enumerate(given))


def everything(given: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(given)))


def as_one(function):
    """The same as a scalar, of which `grad` takes the derivative."""

    def scalar(*given):
        outputs = function(*given)
        return sum(o.square().sum() for o in ([outputs] if isinstance(outputs, Tensor) else outputs))

    return scalar


def dual_numbers(function, given):
    """Of leaves, which require a gradient too."""
    with forward_ad.dual_level():
        leaves = [x.clone().requires_grad_() for x in given]
        duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, tangents(given), strict=True)]
        outputs = function(*duals)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        return [tuple(forward_ad.unpack_dual(output)) for output in outputs]


def of_one_argument_after_the_other(jacobian):
    """So that those are mapped over and the rest isn't."""
    return lambda function, given: [jacobian(function, i)(*given) for i in everything(given)]


def gradients_of_each_sample(function, given):
    several = tuple(torch.stack([x, x.flip(0) if x.dim() else 2 * x]) for x in given)
    return vmap(grad(as_one(function), everything(given)))(*several)


DERIVATIVES = {
    "jvp": lambda function, given: jvp(function, given, tangents(given)),
    "dual numbers": dual_numbers,
    "jacfwd": of_one_argument_after_the_other(jacfwd),
    "jacrev": of_one_argument_after_the_other(jacrev),
    "gradients of each sample": gradients_of_each_sample,
    "forward mode of torch.autograd": partial(
        torch.autograd.functional.jacobian, strategy="forward-mode", vectorize=True
    ),
}


@every_op
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivatives(derivative, ours, theirs, given):
    torch.testing.assert_close(derivative(ours, given), derivative(theirs, given))


@every_op
def test_second_derivatives(ours, theirs, given):
    results = [hessian(lambda x, f=f: as_one(f)(x, *given[1:]))(given[0]) for f in (ours, theirs)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_by_autograd_are_refused(name):
    ours, _, given = CASES[name]
    leaves = [x.clone().requires_grad_() for x in given]
    first = torch.autograd.grad(as_one(ours)(*leaves), leaves, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match=r"evakernels: \w+ has no second derivative"):
        sum(gradient.sum() for gradient in first if gradient is not None).backward()


@every_op
def test_second_derivatives_as_torch_operators(ours, theirs, given):
    x = given[0].clone().requires_grad_()
    with evakernels.as_torch_operators():
        (first,) = torch.autograd.grad(as_one(ours)(x, *given[1:]), x, create_graph=True)
    (expected,) = torch.autograd.grad(as_one(theirs)(x, *given[1:]), x, create_graph=True)
    torch.testing.assert_close(first, expected)
    results = [torch.autograd.grad(g.square().sum(), x)[0] for g in (first, expected)]
    torch.testing.assert_close(*results)


@every_op
def test_backward_passes_of_several_cotangents(ours, theirs, given):
    """Of outputs whose forward pass nothing has transformed."""
    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in given]
        output = function(*leaves)
        output = output if isinstance(output, Tensor) else output[0]
        cotangents = randn(3, *output.shape, seed=9)
        found = torch.autograd.grad(output, leaves, cotangents, is_grads_batched=True, allow_unused=True)
        results.append(found)
    torch.testing.assert_close(*results)


QUICK = ("layer_norm-add_then_norm-layer-True-True", "rope_attention-shared")
COMPILED = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.exhaustive)
    for name in CASES
    if not name.startswith("packed_attention")
]


@pytest.mark.parametrize("name", COMPILED)
def test_dual_numbers_in_compiled_code(name):
    """But of packed attention: its reference asks for lengths, and where a graph breaks torch loses dual numbers."""
    torch._dynamo.reset()
    ours, theirs, given = CASES[name]

    @torch.compile(backend="aot_eager")
    def pushed(primals, directions):
        with forward_ad.dual_level():
            outputs = ours(*(forward_ad.make_dual(*pair) for pair in zip(primals, directions, strict=True)))
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            return [forward_ad.unpack_dual(output).tangent for output in outputs]

    expected = jvp(theirs, given, tangents(given))[1]
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    torch.testing.assert_close(pushed(given, tangents(given)), expected)
