import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from op_checks import Recorder, served_by
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import BaseTorchFunctionMode

import evakernels
from evakernels import _native, backends, triton

OP = "layer_norm_forward"


@pytest.fixture
def calls():
    """The backends that served `layer_norm_forward`, in order; the reference computes, whoever is asked."""
    served = []
    compute = backends._implementations[OP]["reference"].function

    def recorded(backend):
        def function(*args):
            served.append(backend)
            return compute(*args)

        return function

    def float32_only(x, *_):
        return [] if x.dtype == torch.float32 else [f"{x.dtype} is not float32", "it is a test"]

    fakes = {
        "cpu": backends.Implementation("cpu", recorded("cpu"), float32_only),
        "reference": backends.Implementation("reference", recorded("reference"), lambda *_: []),
    }
    with served_by(OP, fakes):
        yield served


def test_preferred_backend_serves_before_reference(calls):
    evakernels.layer_norm(torch.ones(2, 4))
    evakernels.layer_norm(torch.ones(2, 4).double())
    assert calls == ["cpu", "reference"]


def test_forced_backend_raises_with_all_reasons(calls):
    message = "backend 'cpu' doesn't support layer_norm_forward: torch.float64 is not float32; it is a test"
    with evakernels.use_backend("cpu"), pytest.raises(evakernels.BackendError, match=message):
        evakernels.layer_norm(torch.ones(2, 4).double())
    assert calls == []


def test_overrides_end_with_their_block(calls):
    x = torch.ones(2, 4)
    with evakernels.use_backend("cpu"):
        with pytest.raises(ValueError, match="bias"), evakernels.use_backend("reference"):
            evakernels.layer_norm(evakernels.layer_norm(x), bias=x)
        evakernels.layer_norm(x)
    with evakernels.use_backend("reference"), evakernels.use_backend("cpu"):
        evakernels.layer_norm(x)
    assert calls == ["reference", "cpu", "cpu"]
    assert backends.overrides() is None


def test_overrides_do_not_leak_across_threads(calls):
    """A enters, B enters, A leaves, B leaves; each thread sees its own choice alone."""
    x, others = torch.ones(2, 4), []
    first, second = (
        evakernels.use_backend("reference"),
        backends.observed_by(lambda op, backend: others.append(backend)),
    )
    with ThreadPoolExecutor(1) as a, ThreadPoolExecutor(1) as b:

        def step(thread, function, *args):
            thread.submit(function, *args).result()

        step(a, first.__enter__)
        step(b, second.__enter__)
        for thread in (a, b):
            step(thread, evakernels.layer_norm, x)
        evakernels.layer_norm(x)
        step(a, first.__exit__, None, None, None)
        step(b, second.__exit__, None, None, None)
        for thread in (a, b):
            step(thread, evakernels.layer_norm, x)
    evakernels.layer_norm(x)
    assert calls == ["reference", *["cpu"] * 5]
    assert others == ["cpu"]
    assert backends.overrides() is None


def test_overrides_hold_in_threads_of_backward():
    """Deeply nested backward passes run on other threads, as all do on a GPU."""
    seen = {}

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, depth):
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen[threading.get_ident()] = backends.overrides()
            if ctx.depth:
                with torch.enable_grad():
                    Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).backward()
            return gradient, None

    with evakernels.use_backend("reference"):
        Nested.apply(torch.ones(1, requires_grad=True), 100).backward()
    assert len(seen) > 1
    assert {found.forced for found in seen.values()} == {"reference"}
    seen.clear()
    Nested.apply(torch.ones(1, requires_grad=True), 100).backward()
    assert set(seen.values()) == {None}


def test_forced_reference_holds_in_compiled_code(calls):
    """Also when the function was compiled before, without the override."""
    compiled = torch.compile(lambda x: evakernels.layer_norm(x), fullgraph=True, backend="aot_eager")
    x = torch.ones(2, 4)
    compiled(x)
    with evakernels.use_backend("reference"):
        compiled(x)
    compiled(x)
    assert calls == ["cpu", "reference", "cpu"]


def test_forced_reference_holds_in_backward(calls):
    op, served = "layer_norm_backward", []
    compute = backends._implementations[op]["reference"].function
    fakes = {
        name: backends.Implementation(name, lambda *args, n=name: served.append(n) or compute(*args), lambda *_: [])
        for name in ("cpu", "reference")
    }
    x = torch.ones(2, 4, requires_grad=True)
    with served_by(op, fakes):
        with evakernels.use_backend("reference"):
            evakernels.layer_norm(x).sum().backward()
        evakernels.layer_norm(x).sum().backward()
    assert served == ["reference", "cpu"]


def test_explain_lists_backends_and_reasons(calls):
    for x, verdicts in (
        (torch.ones(2, 4), ["no cuda", "no triton", "cpu: selected", "not preferred here"]),
        (torch.ones(2, 4).double(), ["no cuda", "no triton", "float32; it is a test", "reference: selected"]),
    ):
        lines = evakernels.explain("layer_norm", x, eps=1e-6).splitlines()
        assert all(verdict in line for verdict, line in zip(verdicts, lines, strict=True)), lines


@pytest.fixture
def machine(monkeypatch):
    """`machine(build, capability, driver)` pretends a build of the library, a GPU and its driver."""

    def pretend(build, capability, driver):
        monkeypatch.setattr(_native, "LOADED", True)
        monkeypatch.setattr(_native, "implemented", lambda op, device: True)
        monkeypatch.setattr(_native, "build_record", lambda: build)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
        _native.gpu_unsupported_reason.cache_clear()

    yield pretend
    _native.gpu_unsupported_reason.cache_clear()


@pytest.mark.parametrize(
    ("capability", "driver", "build", "runs"),
    [
        ((7, 5), 13000, {"cuda_codes": ["sm_80", "compute_100"]}, False),
        ((8, 9), 13000, {"cuda_codes": ["sm_80", "compute_100"]}, True),
        ((13, 0), 13000, {"cuda_codes": ["sm_80", "compute_100"]}, True),  # by the PTX
        ((9, 0), 13000, {"cuda_codes": ["sm_80"]}, False),
        ((7, 5), 13000, {}, True),  # an unknown build
        ((9, 0), 12080, {"cuda_release": "13.0"}, False),
        ((9, 0), 12040, {"cuda_release": "12.9"}, True),
        ((9, 0), 12080, {"cuda_release": "12.9", "cuda_codes": ["sm_90", "compute_100"]}, True),
        ((11, 0), 12080, {"cuda_release": "12.9", "cuda_codes": ["sm_90", "compute_100"]}, False),
        ((11, 0), 12090, {"cuda_release": "12.9", "cuda_codes": ["sm_90", "compute_100"]}, True),
    ],
)
def test_gpu_that_the_build_lacks_is_refused(capability, driver, build, runs, machine):
    """The next backend serves the call; CUDA would end it with an error."""
    machine(build, capability, driver)
    reasons = backends.unsupported_reasons(OP, "cuda", on_a_gpu(), None, None, 1e-6, False)
    assert len(reasons) == (not runs)


# Incomplete calls of a SwiGLU MLP have no device, and complete ones the reasons of its gated product.
@pytest.mark.parametrize("op", [op for op in backends.ops() if "mlp" not in op])
def test_explain_names_old_driver(op, machine):
    machine({"cuda_release": "13.0", "cuda_codes": ["sm_90"]}, (9, 0), 12080)
    takes_list = str(backends.overload(op)._schema.arguments[0].type).startswith("List")
    arguments = [on_a_gpu()] if takes_list else on_a_gpu()
    lines = evakernels.explain(getattr(torch.ops.evakernels, op), arguments).splitlines()
    assert "the driver is for CUDA 12.8; the library was compiled with CUDA 13.0" in lines[0], lines


def test_error_without_any_backend_lists_all():
    refusing = {
        backend: backends.Implementation(backend, lambda: None, lambda *_, b=backend: [f"{b} is tired"])
        for backend in backends.PREFERENCE
    }
    message = r"no backend supports layer_norm_forward(.|\n)*cpu is tired"
    with served_by(OP, refusing), pytest.raises(evakernels.BackendError, match=message):
        evakernels.layer_norm(torch.ones(2, 4))


WIDEST = {"layer_norm": 8192, "swiglu": 4096, "rope_attention": 128, "packed_attention": 128}


def triton_reasons(op, width, **given):
    """Reasons against tensors `[1, 1, 1, width]` on a GPU."""
    with FakeTensorMode():
        x = torch.ones(1, 1, 1, width, device="cuda", dtype=torch.bfloat16)
    names = [argument.name for argument in getattr(torch.ops.evakernels, op).default._schema.arguments]
    return backends.unsupported_reasons(
        op, "triton", *(given.get(name, x if i == 0 else None) for i, name in enumerate(names))
    )


@pytest.mark.parametrize("op", [f"{family}_{way}" for family in WIDEST for way in ("forward", "backward")])
def test_triton_refuses_long_rows(op, monkeypatch):
    monkeypatch.setattr(triton, "_installed", lambda: True)
    monkeypatch.setattr(triton, "_too_old", lambda index: [])
    widest, given = WIDEST[op.rpartition("_")[0]], {"scale": 1.0, "norm_weight": torch.ones(1)}
    assert triton_reasons(op, widest, **given) == []
    assert triton_reasons(op, 2 * widest, **given) != []
    if "attention" in op:
        assert "scale" in "".join(triton_reasons(op, 64, scale=-1.0))


def test_triton_refuses_gpu_and_dtype(monkeypatch):
    monkeypatch.setattr(triton, "_installed", lambda: True)
    monkeypatch.setattr(triton, "_too_old", lambda index: ["it is too old"])
    assert triton_reasons(OP, 4) == ["it is too old"]
    assert backends.unsupported_reasons(OP, "triton", torch.ones(2, 4).double()) == [
        "the tensors are on cpu, not on a GPU",
        "torch.float64 is not one of float32, bfloat16, float16",
    ]
    assert backends.unsupported_reasons("gelu_forward", "triton") == ["gelu_forward has no triton implementation"]
    monkeypatch.setattr(triton, "_installed", lambda: False)
    assert triton_reasons(OP, 4) == ["triton is not installed"]


def test_triton_reasons_do_not_import_triton():
    code = """if True:
        import sys, torch
        from evakernels import backends, triton
        x = torch.ones(2, 8)
        for op in ("layer_norm_forward", "swiglu_forward", "rope_attention_forward", "contrastive_forward"):
            backends.unsupported_reasons(op, "triton", x)
        sys.exit("triton" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def forced(name):
    with evakernels.use_backend(name):
        pass


@pytest.mark.parametrize(
    ("call", "given", "known"),
    [
        (evakernels.explain, "Rope-Attention", "'rope_attention'"),
        (evakernels.explain, "softmax", "adamw_update"),
        *((evakernels.explain, part, "layer_norm") for part in ("rope", "add", "token", "packed", "lamb")),
        (forced, "Cpu", "'cpu'"),
        (lambda name: backends.register(OP, name, lambda: None), "quantum", "cuda"),
    ],
)
def test_unknown_name_error_lists_known_names(call, given, known):
    with pytest.raises(ValueError, match=f"(op|backend) must be .*{known}"):
        call(given)


def test_plain_calls_bypass_the_dispatcher():
    """A dispatch mode sees the op; the profiler of a plain call, with a gradient or without, sees a kernel alone."""
    x = torch.ones(2, 4)
    with Recorder() as recorder:
        evakernels.layer_norm(x)
        evakernels.layer_norm(x.clone().requires_grad_())
    assert [op for op, _ in recorder.own_calls()] == [torch.ops.evakernels.layer_norm_forward.default] * 2
    with torch.profiler.profile() as profiler:
        evakernels.layer_norm(x)
        evakernels.layer_norm(x.clone().requires_grad_()).sum().backward()
    assert not [event.name for event in profiler.events() if event.name.startswith("evakernels::")]


@pytest.mark.parametrize("op", ["layer_norm", "gelu", "swiglu"])
def test_fast_path_changes_no_bit(op):
    """A mode that does nothing makes the dispatcher run the op."""
    gate, up = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    given = {"layer_norm": (gate, up[0], up[1]), "gelu": (gate, up[0]), "swiglu": (gate, up)}[op]
    results = []
    for mode in (nullcontext(), BaseTorchFunctionMode()):
        leaves = [x.clone().requires_grad_() for x in given]
        with mode:
            out = getattr(evakernels, op)(*leaves)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("mode", [nullcontext, BaseTorchFunctionMode])
def test_choice_is_made_once(calls, monkeypatch, mode):
    """By dtypes, shapes, devices, gradients, numbers and switches; errors are never cached."""
    asked, select = [], backends.select
    monkeypatch.setattr(backends, "select", lambda op, args: asked.append(op) or select(op, args))
    x, weight = torch.ones(2, 4), torch.nn.Parameter(torch.ones(4))
    with mode():
        for _ in range(2):
            evakernels.layer_norm(x, weight)
            evakernels.layer_norm(x.clone(), weight.clone())
        assert asked == [OP]
        for _ in range(2):
            evakernels.layer_norm(x[:1], weight)
            evakernels.layer_norm(x.double(), weight)
            evakernels.layer_norm(x, weight, eps=1e-6)
            evakernels.rms_norm(x, weight)
            with torch.autocast("cpu"):
                evakernels.layer_norm(x, weight)
        assert asked == [OP] * 6
        for _ in range(2):
            with pytest.raises(ValueError, match="weight"):
                evakernels.layer_norm(x, weight[:3])
        assert asked == [OP] * 6


def test_cached_calls_get_the_casts_of_the_check():
    """Autocast's casts, which autograd sees, and numbers that stand for None."""
    q, k, v = torch.randn(3, 1, 5, 2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    for _ in range(3):
        leaf = q.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = evakernels.rope_attention(leaf, k, v)
        out.sum().backward()
        assert out.dtype == torch.bfloat16
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(evakernels.rope_attention(q, k, v), evakernels.rope_attention(q, k, v, scale=8**-0.5))


def on_a_gpu() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(2, 4, device="cuda")


@pytest.fixture
def refused(monkeypatch):
    """No kernel serves a GPU."""
    monkeypatch.setattr(backends, "_warned", set())
    known = backends._implementations[OP]
    tired = {
        backend: backends.Implementation(backend, known[backend].function, lambda *_: ["it is tired"], "cuda")
        for backend in ("cuda", "triton")
    }
    with served_by(OP, known | tired):
        yield


def test_reference_on_gpu_warns_once(refused):
    given = on_a_gpu(), None, None, 1e-5, False
    with pytest.warns(evakernels.ReferenceWarning, match="cuda: it is tired"):
        assert backends.select(OP, given).backend == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error", evakernels.ReferenceWarning)
        assert backends.select(OP, given).backend == "reference"
        backends._warned.clear()
        with evakernels.use_backend("reference"):  # which is what was asked for
            backends.select(OP, given)


def test_reference_on_gpu_is_an_error_when_strict(refused, monkeypatch):
    monkeypatch.setenv("EVAKERNELS_STRICT", "1")
    with pytest.raises(evakernels.BackendError, match="EVAKERNELS_STRICT"):
        backends.select(OP, (on_a_gpu(), None, None, 1e-5, False))
    monkeypatch.setenv("EVAKERNELS_STRICT", "0")
    with pytest.warns(evakernels.ReferenceWarning):
        backends.select(OP, (on_a_gpu(), None, None, 1e-5, False))
    monkeypatch.setenv("EVAKERNELS_STRICT", "foo")
    with pytest.raises(ValueError, match="EVAKERNELS_STRICT"):
        backends.select(OP, (on_a_gpu(), None, None, 1e-5, False))
