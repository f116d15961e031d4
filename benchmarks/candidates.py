"""The candidates of an operation: this library on each of its backends, plain PyTorch, and the peers."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import evakernels
from benchmarks.operation import Function, Kind, Operation, peers_of
from evaclip.errors import UserError, unknown_name
from evaclip.machine import version_of
from evakernels.backends import unsupported_reasons

OURS, COMPILE = "evakernels", "torch.compile"
NOBODY = "none"
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
"""The backends of each device type, in the order of `evakernels.backends.PREFERENCE`."""


@dataclass(frozen=True)
class Candidate:
    """One implementation of an operation.

    Attributes:
        name: `evakernels <backend>`, `torch.compile`, or the name of the baseline or the peer.
        version: version of its distribution.
        build: makes the function for a shape.
        context: context manager of every call.
    """

    name: str
    kind: Kind
    version: str
    build: Callable[[Any], Function]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def candidates(
    op: Operation, device: str, backends: Sequence[str] = (), peers: Sequence[str] = ()
) -> tuple[list[Candidate], dict[str, str]]:
    """Return all candidates of `op`, and the absent ones with the reason.

    Args:
        op: the operation.
        device: the device type.
        backends: backends of this library; by default all that implement the op.
        peers: names of peers, `torch.compile` among them; by default all. `none` for none. The operation's baseline is
            always there: the others are compared with it.
    """
    found, absent = _list_ours(op, device, backends)
    version = version_of(op.baseline_package) or ""
    found.append(Candidate(op.baseline, "baseline", version, lambda shape: op.eager))
    if op.compiles and (not peers or COMPILE in peers):
        found.append(Candidate(COMPILE, "peer", torch.__version__, lambda shape: compiled(op.eager)))
    for peer in peers_of(op.name):
        if peers and peer.name not in peers:
            continue
        reason = peer.absence(device)
        if reason is not None:
            absent[peer.name] = reason
        else:
            found.append(Candidate(peer.name, peer.kind, version_of(peer.package or "torch") or "", peer.build))
    if twice := [name for name, count in Counter(one.name for one in found).items() if count > 1]:
        raise UserError(f"{op.name} has two candidates called {twice[0]!r}; name the peer differently")
    return found, absent


def _list_ours(op: Operation, device: str, backends: Sequence[str]) -> tuple[list[Candidate], dict[str, str]]:
    version = evakernels.info()["evakernels"] or ""

    def on_backend(backend: str) -> Candidate:
        context = partial(evakernels.use_backend, backend)
        return Candidate(f"{OURS} {backend}", "ours", version, lambda shape: op.ours, context)

    if op.registered is not None:
        here = [backend for backend in BACKENDS[device] if not backends or backend in backends]
        reasons = {backend: unsupported_reasons(op.registered, backend) for backend in here}
        absent = {f"{OURS} {backend}": "; ".join(why) for backend, why in reasons.items() if why}
        return [on_backend(backend) for backend, why in reasons.items() if not why], absent
    found = []
    if set(backends) != {"reference"}:
        ways = {OURS: op.ours, **{f"{OURS} {name}": function for name, function in op.variants.items()}}
        found += [Candidate(name, "ours", version, partial(_always, function)) for name, function in ways.items()]
    if "reference" in backends or (op.references and not backends):
        found.append(on_backend("reference"))
    return found, {}


def _always(function: Function, shape: Any) -> Function:
    return function


def check_names(chosen: Sequence[Operation], device: str, backends: Sequence[str], peers: Sequence[str]) -> None:
    """Raises `UserError` for an unknown backend of the device type, or a peer of no operation in `chosen`."""
    known = [name for op in chosen for name in (op.baseline, *(peer.name for peer in peers_of(op.name)))]
    for kind, given, accepted in (
        (f"{device} backend", backends, BACKENDS[device]),
        ("peer", peers, [*known, COMPILE, NOBODY]),
    ):
        for name in given:
            if name not in accepted:
                raise unknown_name(kind, name, accepted)


def compiled(function: Function) -> Function:
    """`torch.compile` for one shape; the function is called by keyword."""
    # A compilation cache on disk would make the first call look cheap.
    torch.compiler.config.force_disable_caches = True
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")

    def fresh(**inputs: Any) -> Any:
        return function(**inputs)

    # torch counts the compiled forms of each code object and stops at eight: each case gets a new code object.
    fresh.__code__ = fresh.__code__.replace()
    return torch.compile(fresh, fullgraph=True, dynamic=False)


def compile_frozen(module: torch.nn.Module, backend: str = "inductor", **options: Any) -> Function:
    """`torch.compile` with frozen weights, by torch's backend or by `zentorch`, for calls without gradients."""
    from torch._inductor import config

    if backend == "zentorch":
        import zentorch  # noqa: F401, which registers it
    # By its options torch distinguishes code that was compiled with and without frozen weights.
    if backend == "inductor":
        options["options"] = {"freezing": True}
    function: Function = torch.compile(module, dynamic=False, backend=backend, **options)

    def run(*inputs: Any) -> Any:
        # zentorch sets joint_custom_post_pass for everything that is compiled later.
        with torch.no_grad(), config.patch(freezing=True, joint_custom_post_pass=None):
            return function(*inputs)

    return run
