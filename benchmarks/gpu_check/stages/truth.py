"""The ops' own tests, with their tensors on the GPU and one backend at a time: every test is a case."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from _pytest.runner import runtestprotocol

from benchmarks.gpu_check.stage import Refusal, Session, Settings, Unit
from benchmarks.origin import ROOT
from evakernels import backends, triton

SECONDS = 120

FILES = {
    # Test file: an op that its kernels serve, and the backends that have any. Those that aren't here come last.
    "rope_attention": ("rope_attention_forward", ("cuda", "triton")),
    "layer_norm": ("layer_norm_forward", ("cuda", "triton")),
    "on_gpu": ("layer_norm_forward", ("", "triton")),
    "residual_norm": ("add_layer_norm_forward", ("cuda", "triton")),
    "swiglu": ("swiglu_forward", ("cuda", "triton")),
    "token_dropout": ("token_dropout_forward", ("cuda", "triton")),
    "gelu": ("gelu_forward", ("cuda",)),
    "adamw": ("adamw_update", ("triton",)),
    "lamb": ("lamb_step", ("cuda", "triton")),
    "stochastic_rounding": ("lamb_step", ("cuda", "triton")),
    "packed_attention": ("packed_attention_forward", ("cuda", "triton")),
    "contrastive": ("contrastive_forward", ("triton",)),
    "native_optimizers": ("lamb_step", ("cuda", "triton")),
    "optimizers": ("lamb_step", ("cuda", "triton")),
    "norm_widths": ("layer_norm_forward", ("cuda", "triton")),
}
"""The most valuable first. Without a backend the first that serves a call does: other ones for what one lacks."""
for _op in backends.ops():
    _family = backends.family(_op)
    _binding = ROOT / f"csrc/bind/{_family}.cpp"
    _has_cuda = _binding.exists() and "\nEVAKERNELS_OPS(" in _binding.read_text()
    _backends = *("cuda",) * _has_cuda, *("triton",) * (_family in triton.FAMILIES)
    if _backends:
        FILES.setdefault(_family, (_op, _backends))
FIRST = ("accurate", "error_rule", "formula", "odd", "tail", "sizes", "stream", "captured", "huge", "bit_equal")
LAST = ("gradcheck", "opcheck", "compiles", "wrong_input", "autocast", "second_derivative")
"""Parts of tests' names: those that are run in front of the others, and behind them."""
_REHEARSED = {("swiglu", "cuda"), ("swiglu", "triton")}
_TINY = "(test_as_accurate_as_torch and plain) or no_columns"


def units(settings: Settings) -> list[Unit]:
    """One for each file and backend."""
    pairs = [(file, backend) for file, (_, names) in FILES.items() for backend in names]
    pairs.sort(key=lambda pair: pair[1] == "triton")
    return [
        Unit("truth", f"{file} {backend}".strip(), seconds=60, value=90 - number, alone=False)
        for number, (file, backend) in enumerate(pairs)
        if not settings.rehearsal or (file, backend) in _REHEARSED
    ]


def run(unit: Unit, session: Session) -> None:
    """Runs one file's tests in this process."""
    file, _, backend = unit.name.partition(" ")
    if session.settings.rehearsal:
        backend = {"cuda": "cpu"}.get(backend, backend)  # that of the interpreted kernels
    session.case("the backend serves the op", lambda: _serve(FILES[file][0], backend))
    options = ["-q", "-s", "-p", "no:cacheprovider", "--device", session.settings.device]
    options += ["--backend", backend] if backend else []
    options += ["-k", _TINY] if session.settings.rehearsal else []
    path = ROOT / "tests/evakernels" / f"test_{file}.py"
    status = pytest.main([*options, "--rootdir", str(ROOT), str(path)], plugins=[_Recorder(session)])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with {status!r} for {path.name}: see what it printed")


def _serve(op: str, backend: str) -> None:
    """Raises where the kernels are missing: else every test would be refused, and none would fail."""
    reasons = backends.why_not(op, backend or "cuda")
    assert not reasons, f"{backend} serves no {op}: {'; '.join(reasons)}"


@dataclass
class _Recorder:
    """A plugin of pytest that makes each test a case of the session."""

    session: Session

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: _order(item.name))

    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        self.session.case(item.nodeid.partition("::")[2], lambda: _outcome(item, nextitem))
        return True


def _order(name: str) -> int:
    def has(parts: Sequence[str]) -> bool:
        return any(part in name for part in parts)

    return 2 if has(LAST) else 0 if has(FIRST) else 1


def _outcome(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    for report in runtestprotocol(item, nextitem=nextitem, log=False):
        if report.failed and "torch.OutOfMemoryError" in report.longreprtext:
            raise Refusal("out of memory")  # others use the GPU too
        if report.failed:
            raise AssertionError(_message(report.longreprtext))
        if report.skipped:
            _, _, reason = report.longrepr if isinstance(report.longrepr, tuple) else ("", 0, report.longreprtext)
            raise Refusal(reason)


def _message(text: str) -> str:
    """The lines that pytest marks as the error, and where it came up."""
    lines = text.splitlines()
    return "\n".join([*(line[1:].strip() for line in lines if line.startswith("E ")), *lines[-1:]])
