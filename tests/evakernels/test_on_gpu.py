"""What GPUs show of every op: other streams, captured graphs, grids of many blocks, more than 2^31 elements.

What needs no stream or graph runs on a CPU too, at sizes of its own.
"""

from functools import partial

import pytest
import torch
from on_device import DEVICE
from test_functorch import CASES as DIFFERENTIABLE
from test_wrong_input import CALLS
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

import evakernels

ON_GPU = DEVICE.type == "cuda"
NEEDS_GPU = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: --device cuda")


def results(function, given):
    """Outputs and gradients, without a look at the host: the cotangents are made of the outputs."""
    leaves = [t.detach().requires_grad_() for t in given]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    gradients = torch.autograd.grad(outputs, leaves, [o.detach().sin() for o in outputs], allow_unused=True)
    return [o.detach() for o in outputs] + [g for g in gradients if g is not None]


def written(op, arguments):
    """What a call of an optimizer's op leaves in its arguments, and what it returns."""
    returned = getattr(evakernels, op)(**arguments)
    return [t for t in tree_flatten((arguments, returned))[0] if isinstance(t, Tensor)]


def calls():
    """Name, a function of the arguments that returns all tensors that a call computes or writes, and arguments."""
    for name, (function, _, given) in DIFFERENTIABLE.items():
        for dtype in (torch.bfloat16, torch.float32):
            yield f"{name}-{dtype}", partial(results, function), [t.to(dtype) for t in given]
    for op, arguments in CALLS.items():
        for found_inf in (0.0, 1.0) if op.startswith(("adamw", "lamb")) else ():
            yield f"{op}-{found_inf}", partial(written, op), arguments | {"found_inf": torch.tensor(found_inf)}


EVERY = {name: (call, arguments) for name, call, arguments in calls()}
every_call = pytest.mark.parametrize(("call", "arguments"), EVERY.values(), ids=EVERY)


def scaled(arguments, factor):
    """A copy, of which the floating-point tensors are multiplied by a factor."""
    return tree_map(lambda t: t * (factor if t.is_floating_point() else 1) if isinstance(t, Tensor) else t, arguments)


def copy(target, source):
    for a, b in zip(tree_flatten(target)[0], tree_flatten(source)[0], strict=True):
        if isinstance(a, Tensor):
            a.copy_(b)


def assert_equal(actual, expected):
    assert len(actual) == len(expected) > 0
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), (i, a, b)


# --- streams and captured graphs ------------------------------------------------------------------------------------


@NEEDS_GPU
@every_call
def test_another_stream(call, arguments):
    """The stream writes the arguments late: what doesn't wait for it reads zeros."""
    late, expected = scaled(arguments, 0), call(scaled(arguments, 1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        copy(late, arguments)
        found = call(late)
    stream.synchronize()
    assert_equal(found, expected)


@NEEDS_GPU
@every_call
def test_captured_graph_replays_new_values(call, arguments):
    static, eager = scaled(arguments, 1), scaled(arguments, 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(static)
    for factor in (1.0, 0.5, 3.0):
        eager = scaled(eager, factor)
        copy(static, eager)
        graph.replay()
        assert_equal(found, call(eager))


# --- many blocks ----------------------------------------------------------------------------------------------------

ROWS = 8192 if ON_GPU else 40


def normal(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def vectors(width, count):
    return [normal(width, seed=9 + i) for i in range(count)]


def kept_half(patches):
    """Every second token of each sample, another half in every second sample."""
    batch, tokens = patches.shape[:2]
    first = torch.arange(batch, device=patches.device)[:, None] % 2
    return first + torch.arange(0, tokens - 1, 2, device=patches.device)


def sequences_of(qkv, length=32):
    return torch.arange(0, len(qkv) + 1, length, device=qkv.device)


# Of one matrix or several whose rows (samples, tokens) are many, and of parameters.
WIDE = {
    "layer_norm": (evakernels.layer_norm, 1, (1408,), vectors(1408, 2)),
    "layer_norm-odd": (evakernels.layer_norm, 1, (2730,), vectors(2730, 2)),
    "add_layer_norm": (evakernels.add_layer_norm, 2, (1024,), vectors(1024, 2)),
    "layer_norm_add": (evakernels.layer_norm_add, 2, (1408,), vectors(1408, 2)),
    "swiglu": (evakernels.swiglu, 2, (2048,), []),
    "swiglu-norm": (evakernels.swiglu, 2, (2730,), vectors(2730, 2)),
    "gelu": (evakernels.gelu, 1, (4096,), vectors(4096, 1)),
    "token_dropout": (
        lambda x, prefix, pos_embed: evakernels.token_dropout(x, kept_half(x), prefix=prefix, pos_embed=pos_embed),
        1,
        (64, 768),
        [normal(1, 768, seed=7), normal(65, 768, seed=8)],
    ),
    "rope_attention": (lambda qkv: evakernels.rope_attention(*qkv.unbind(2)), 1, (33, 3, 8, 64), []),
    "packed_attention": (
        lambda qkv: evakernels.packed_attention(*qkv.unbind(1), sequences_of(qkv), max_seqlen=32),
        1,
        (3, 8, 64),
        [],
    ),
}
every_wide = pytest.mark.parametrize("name", WIDE)


@every_wide
def test_many_blocks_are_bit_equal(name):
    function, count, shape, parameters = WIDE[name]
    rows = 32 * (ROWS // 32) if name == "packed_attention" else ROWS // shape[0] + 2 if len(shape) > 1 else ROWS
    given = [normal(rows, *shape, seed=i) for i in range(count)] + parameters
    first = results(function, given)
    for _ in range(3):
        assert_equal(results(function, given), first)


# --- more elements than 32 bits count -------------------------------------------------------------------------------

ELEMENTS = 2**31 if ON_GPU else 2**12
TAIL = 96  # rows at the end that aren't zero; whole sequences of packed attention
MARGIN = 4 << 30


def needs_memory(bytes_needed):
    if ON_GPU:
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < bytes_needed + MARGIN:
            pytest.skip(f"needs {(bytes_needed + MARGIN) >> 30} GiB of GPU memory")


@every_wide
def test_huge_tensor_last_rows(name):
    """Zeros but for its last rows: all results there, and the parameters' gradients, are those of these rows alone."""
    function, count, shape, parameters = WIDE[name]
    # Of attention the outputs, a third of the packed inputs, are to be as large.
    size = torch.Size(shape).numel() // (3 if "attention" in name else 1)
    rows = max(-(-ELEMENTS // size) // 32 * 32 + TAIL, 2 * TAIL)
    needs_memory(2 * rows * torch.Size(shape).numel() * (3 * count + 2))
    tails = [normal(TAIL, *shape, seed=i) for i in range(count)]
    expected = outputs_and_gradients(function, tails + parameters, TAIL)
    wholes = [torch.zeros(rows, *shape, dtype=t.dtype, device=DEVICE) for t in tails]
    for whole, tail in zip(wholes, tails, strict=True):
        whole[-TAIL:] = tail
    actual = outputs_and_gradients(function, wholes + parameters, TAIL)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-3 * b.abs().max().item(), msg=lambda m, i=i: f"{i}: {m}")


def outputs_and_gradients(function, given, tail):
    """Those of the last rows, for cotangents that are zero elsewhere; those of parameters as they are."""
    leaves = [t.detach().requires_grad_() for t in given]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    cotangents = [torch.zeros_like(o) for o in outputs]
    for i, cotangent in enumerate(cotangents):
        cotangent[-tail:] = normal(tail, *cotangent.shape[1:], seed=20 + i)
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    rows = len(given[0])
    return [t.detach()[-tail:].clone() if len(t) == rows else t.detach() for t in (*outputs, *gradients)]


def optimizer_state(size, dtype=torch.bfloat16):
    """One tensor a buffer, zeros but for the last elements."""
    buffers = [torch.zeros(size, dtype=dtype, device=DEVICE) for _ in range(4)]
    for i, buffer in enumerate(buffers):
        buffer[-TAIL:] = normal(TAIL, seed=i).abs()
    return [[buffer] for buffer in buffers] + [[torch.tensor(3.0)]]


@pytest.mark.parametrize("step", [evakernels.adamw_update, evakernels.lamb_step])
def test_huge_parameter_last_elements(step):
    needs_memory(4 * 2 * ELEMENTS)
    whole, part = optimizer_state(ELEMENTS + TAIL + 1), optimizer_state(TAIL)
    for state in (whole, part):
        step(*state, [0.1], [0.05], betas=(0.9, 0.98), eps=1e-6)
    for a, b in zip(whole[:4], part[:4], strict=True):
        torch.testing.assert_close(a[0][-TAIL:], b[0], rtol=0.01, atol=1e-3)
    assert not whole[0][0][:-TAIL].any()


def test_huge_gradient_norm():
    needs_memory(2 * ELEMENTS)
    whole = torch.zeros(ELEMENTS + TAIL + 1, dtype=torch.bfloat16, device=DEVICE)
    whole[-TAIL:] = 1
    torch.testing.assert_close(evakernels.gradient_norm([whole]), torch.tensor(TAIL**0.5))


@NEEDS_GPU
def test_gradient_norm_over_two_devices():
    weights = [torch.nn.Parameter(torch.zeros(2, device=device)) for device in (DEVICE, "cpu")]
    for weight in weights:
        weight.grad = torch.tensor([3.0, 4.0], device=weight.device)
    norm = evakernels.clip_grad_norm_(weights, 1.0)
    torch.testing.assert_close(norm, torch.tensor(50.0**0.5, device=DEVICE))
    for weight in weights:
        torch.testing.assert_close(weight.grad.cpu(), torch.tensor([3.0, 4.0], device="cpu") / 50.0**0.5)


# --- memory and drawing ---------------------------------------------------------------------------------------------


@NEEDS_GPU
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_large_batch_loss_memory(backend):
    batch = 32_768  # the matrix would have 4 GiB
    image, text = (torch.nn.functional.normalize(normal(batch, 64, seed=s).float()).requires_grad_() for s in (0, 1))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with evakernels.use_backend(backend):
        evakernels.clip_loss(image, text, scale, label_smoothing=0.1).backward()
        evakernels.siglip_loss(image, text, scale, bias).backward()
    assert torch.cuda.max_memory_allocated() - before < 1 << 30
