import re
import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from op_checks import served_by
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import evakernels
from evakernels import _native, backends, triton

OP = "layer_norm_forward"
NO_OPS = {"as_torch_operators", "gradient_norm", "sample_token_index"}


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
    message = "backend 'cpu' can't serve layer_norm_forward: torch.float64 is not float32; it is a test"
    with evakernels.use_backend("cpu"), pytest.raises(evakernels.BackendError, match=message):
        evakernels.layer_norm(torch.ones(2, 4).double())
    assert calls == []


def test_overrides_end_with_their_block(calls):
    x = torch.ones(2, 4)
    with evakernels.use_backend("cpu"):
        with pytest.raises(ValueError, match="bias without weight"), evakernels.use_backend("reference"):
            evakernels.layer_norm(evakernels.layer_norm(x), bias=x)
        evakernels.layer_norm(x)
    with evakernels.use_backend("reference"), evakernels.use_backend("cpu"):
        evakernels.layer_norm(x)
    assert calls == ["reference", "cpu", "cpu"]
    assert backends.overrides is None


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
        (torch.ones(2, 4), ["no cuda", "no triton", "cpu: serves the call", "not preferred here"]),
        (torch.ones(2, 4).double(), ["no cuda", "no triton", "float32; it is a test", "reference: serves the call"]),
    ):
        lines = evakernels.explain("layer_norm", x, eps=1e-6).splitlines()
        assert all(verdict in line for verdict, line in zip(verdicts, lines, strict=True)), lines


def test_compiled_library_refuses_missing_kernels(monkeypatch):
    """With the real reasons, whether or not the library is built here."""
    monkeypatch.setattr(_native, "LOADED", False)
    monkeypatch.setattr(_native, "REASON", "not built: no compiler")
    assert "the compiled library is not loaded: not built: no compiler" in evakernels.explain("layer_norm")
    monkeypatch.setattr(_native, "LOADED", True)
    monkeypatch.setattr(_native, "implemented", lambda op, device: op == OP)
    assert "layer_norm_backward has no compiled CPU kernel" in evakernels.explain("layer_norm_backward")
    reasons = evakernels.explain("layer_norm", torch.ones(2, 4, device="meta", dtype=torch.float64))
    assert "the tensors are on meta, not on a CPU" in reasons
    assert "torch.float64 is not one of float32, bfloat16, float16" in reasons


ALL = ["sm_80", "sm_90", "sm_100", "sm_120", "compute_100"]


@pytest.mark.parametrize(
    ("capability", "codes", "runs"),
    [
        ((7, 5), ALL, False),
        ((8, 9), ALL, True),
        ((13, 0), ALL, True),  # by the PTX
        ((9, 0), ["sm_80"], False),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_86", "compute_86"], True),
        # The library of an unknown build.
        ((7, 5), [], True),
    ],
)
def test_gpu_without_compiled_code_is_refused(capability, codes, runs, monkeypatch):
    """For a reason, so that the next backend serves the call; CUDA would end it with `no kernel image`."""
    monkeypatch.setattr(_native, "LOADED", True)
    monkeypatch.setattr(_native, "implemented", lambda op, device: True)
    monkeypatch.setattr(_native, "build_record", lambda: {"cuda_codes": codes})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    _native.why_not_on_gpu.cache_clear()
    with FakeTensorMode():
        x = torch.ones(2, 4, device="cuda")
    reasons = backends.why_not(OP, "cuda", x, None, None, 1e-6, False)
    _native.why_not_on_gpu.cache_clear()
    assert len(reasons) == (not runs)


@pytest.mark.parametrize(("release", "driver", "runs"), [("13.0", 12080, False), ("12.9", 12040, True)])
def test_driver_of_older_major_cuda_is_refused(release, driver, runs, monkeypatch):
    """For a reason, so that the next backend serves the call; the runtime would end it with an error."""
    monkeypatch.setattr(_native, "LOADED", True)
    monkeypatch.setattr(_native, "implemented", lambda op, device: True)
    monkeypatch.setattr(_native, "build_record", lambda: {"cuda_release": release})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    _native.why_not_on_gpu.cache_clear()
    reasons = backends.why_not(OP, "cuda", on_a_gpu(), None, None, 1e-6, False)
    _native.why_not_on_gpu.cache_clear()
    assert ["driver" in reason for reason in reasons] == [True] * (not runs)


@pytest.mark.parametrize(
    ("capability", "cuda", "refused"), [((7, 5), "13.0", 1), ((8, 0), "13.0", 0), ((7, 5), None, 0)]
)
def test_triton_refuses_old_gpus(capability, cuda, refused, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reasons = triton._too_old.__wrapped__(0)
    assert len(reasons) == refused


def test_error_without_any_backend_lists_all():
    refusing = {
        backend: backends.Implementation(backend, lambda: None, lambda *_, b=backend: [f"{b} is tired"])
        for backend in backends.PREFERENCE
    }
    message = r"no backend serves layer_norm_forward(.|\n)*cpu is tired"
    with served_by(OP, refusing), pytest.raises(evakernels.BackendError, match=message):
        evakernels.layer_norm(torch.ones(2, 4))


WIDEST = {"layer_norm": 8192, "swiglu": 4096, "rope_attention": 128, "packed_attention": 128}
TRITON_OPS = [(family, op) for family, ops in triton.FAMILIES.items() for op in ops]


def triton_reasons(op, width, **given):
    """Of tensors `[1, 1, 1, width]` on a GPU that nothing else refuses."""
    with FakeTensorMode():
        x = torch.ones(1, 1, 1, width, device="cuda", dtype=torch.bfloat16)
    names = [argument.name for argument in getattr(torch.ops.evakernels, op).default._schema.arguments]
    return backends.why_not(op, "triton", *(given.get(name, x if i == 0 else None) for i, name in enumerate(names)))


@pytest.mark.parametrize(("family", "op"), TRITON_OPS)
def test_triton_refuses_long_rows(family, op, monkeypatch):
    monkeypatch.setattr(triton, "_installed", lambda: True)
    monkeypatch.setattr(triton, "_too_old", lambda index: [])
    widest = WIDEST.get(family)
    given = {"scale": 1.0, "norm_weight": torch.ones(1)}
    assert triton_reasons(op, widest or 1 << 20, **given) == []
    assert triton_reasons(op, 2 * widest if widest else 1 << 20, **given) != [] or widest is None
    if family == "swiglu":
        assert triton_reasons(op, 1 << 20) == []
    if "attention" in family:
        assert "scale" in "".join(triton_reasons(op, 64, scale=-1.0))


def test_triton_refuses_gpu_and_dtype(monkeypatch):
    monkeypatch.setattr(triton, "_installed", lambda: True)
    monkeypatch.setattr(triton, "_too_old", lambda index: ["it is too old"])
    assert triton_reasons(OP, 4) == ["it is too old"]
    assert backends.why_not(OP, "triton", torch.ones(2, 4).double()) == [
        "the tensors are on cpu, not on a GPU",
        "torch.float64 is not one of float32, bfloat16, float16",
    ]
    assert backends.why_not("gelu_forward", "triton") == ["gelu_forward has no triton implementation"]
    monkeypatch.setattr(triton, "_installed", lambda: False)
    assert triton_reasons(OP, 4) == ["triton is not installed"]


def test_triton_reasons_do_not_import_triton():
    code = """if True:
        import sys, torch
        from evakernels import backends, triton
        x = torch.ones(2, 8)
        for op in ("layer_norm_forward", "swiglu_forward", "rope_attention_forward", "contrastive_forward"):
            backends.why_not(op, "triton", x)
        sys.exit("triton" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def forced(name):
    with evakernels.use_backend(name):
        pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (evakernels.explain, "unknown op 'Rope-Attention'; did you mean 'rope_attention'?"),
        (evakernels.explain, "unknown op 'softmax'; known: adamw_update, "),
        (forced, "unknown backend 'Cpu'; did you mean 'cpu'?"),
        (lambda name: backends.register(OP, name, lambda: None), "unknown backend 'quantum'; known: cuda, triton, cpu"),
    ],
)
def test_unknown_name_error_lists_known_names(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(message.split("'")[1])


@pytest.mark.parametrize("name", sorted(set(evakernels.ops.__all__) - NO_OPS))
def test_explain_knows_every_public_function(name):
    explained = {line.partition(" on ")[0] for line in evakernels.explain(name).splitlines()}
    several = {
        "clip_loss": {"contrastive_kept_forward", "contrastive_forward"},
        "contrastive_statistics": {"contrastive_kept_forward", "contrastive_forward"},
        "siglip_loss": {"siglip_forward", "siglip_value"},
    }
    assert explained == several.get(name, explained)
    assert len(explained) == len(several.get(name, "1"))
    assert explained <= backends.ops().keys()


def test_explain_takes_functions_too():
    for function in (evakernels.layer_norm, torch.ops.evakernels.layer_norm_forward):
        assert evakernels.explain(function, torch.ones(2, 4)) == evakernels.explain("layer_norm", torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"unknown op <function layer_norm .*known: adamw_update"):
        evakernels.explain(torch.nn.functional.layer_norm, torch.ones(2, 4))


def test_explain_takes_the_arguments_of_a_loss():
    features = torch.ones(2, 4)
    with evakernels.use_backend("reference"):
        text = evakernels.explain("clip_loss", features, features)
        assert text.count("serves the call") == 2
        text = evakernels.explain("clip_loss", features, features, torch.ones(()), label_smoothing=0.1)
        assert text.count("serves the call") == 1


def test_plain_calls_bypass_the_dispatcher():
    """A dispatch mode sees the op; the profiler of a plain call, with a gradient or without, sees a kernel alone."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, 4)
    with Watch():
        evakernels.layer_norm(x)
        evakernels.layer_norm(x.clone().requires_grad_())
    assert seen.count(torch.ops.evakernels.layer_norm_forward.default) == 2
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
    """By dtypes, shapes, devices, numbers and switches; a mode leads to the dispatcher. Errors are never cached."""
    asked, select = [], backends.select
    monkeypatch.setattr(backends, "select", lambda op, args: asked.append(op) or select(op, args))
    x, weight = torch.ones(2, 4), torch.nn.Parameter(torch.ones(4))
    with mode():
        for _ in range(2):
            evakernels.layer_norm(x, weight)
            evakernels.layer_norm(x.clone(), weight.detach())
        assert asked == [OP]
        changed = (
            lambda: evakernels.layer_norm(x[:1], weight),
            lambda: evakernels.layer_norm(x.double(), weight),
            lambda: evakernels.layer_norm(x, weight, eps=1e-6),
            lambda: evakernels.rms_norm(x, weight),
        )
        for call in changed:
            for _ in range(2):
                call()
        assert asked == [OP] * 5
        with torch.autocast("cpu"):
            evakernels.layer_norm(x, weight)
            evakernels.layer_norm(x, weight)
        assert asked == [OP] * 6
        for _ in range(2):
            with pytest.raises(ValueError, match=r"weight has shape \(3,\)"):
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


def test_choices_are_bounded(monkeypatch):
    monkeypatch.setattr(sys.modules["evakernels.ops._fast"], "MAX_ENTRIES", 3)
    backends.choices.clear()
    for rows in range(1, 9):
        evakernels.layer_norm(torch.ones(rows, 4))
        assert len(backends.choices) <= 3


def test_observer_sees_every_call():
    x, seen = torch.ones(2, 4), []
    evakernels.layer_norm(x)
    with backends.observed_by(lambda op, backend: seen.append(op)):
        evakernels.layer_norm(x)
        evakernels.layer_norm(x)
    evakernels.layer_norm(x)
    assert seen == [OP] * 2


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
    text = "layer_norm_forward runs as its reference, in plain PyTorch, which is slow on a GPU (cuda: it is tired; "
    with pytest.warns(evakernels.ReferenceWarning, match=re.escape(text)):
        assert backends.select(OP, given).backend == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error", evakernels.ReferenceWarning)
        assert backends.select(OP, given).backend == "reference"
        backends._warned.clear()
        with evakernels.use_backend("reference"):  # which is what was asked for
            backends.select(OP, given)


def test_reference_on_gpu_is_an_error_when_strict(refused, monkeypatch):
    monkeypatch.setenv("EVAKERNELS_STRICT", "1")
    with pytest.raises(evakernels.BackendError, match=r"triton: it is tired\); EVAKERNELS_STRICT is set"):
        backends.select(OP, (on_a_gpu(), None, None, 1e-5, False))
    monkeypatch.setenv("EVAKERNELS_STRICT", "0")
    with pytest.warns(evakernels.ReferenceWarning):
        backends.select(OP, (on_a_gpu(), None, None, 1e-5, False))
    monkeypatch.setenv("EVAKERNELS_STRICT", "foo")
    with pytest.raises(ValueError, match="EVAKERNELS_STRICT"):
        backends.select(OP, (on_a_gpu(), None, None, 1e-5, False))
