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
from evakernels.backends import why_not

OURS, COMPILE = "evakernels", "torch.compile"
NOBODY = "none"
SERVED = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
"""The backends of each device type, in the order of `evakernels.backends.PREFERENCE`."""


@dataclass(frozen=True)
class Candidate:
    """One implementation of an operation.

    Attributes:
        name: `evakernels <backend>`, `torch.compile`, or that of the baseline or the peer.
        version: of the distribution that it comes from.
        build: makes the function for a shape.
        context: the surroundings in which it must be called.
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
    found, absent = _ours(op, device, backends)
    version = version_of(op.baseline.package) or ""
    found.append(Candidate(op.baseline.name, "baseline", version, _always(op.eager)))
    if op.compiles and (not peers or COMPILE in peers):
        found.append(Candidate(COMPILE, "peer", torch.__version__, lambda shape: compiled(op.eager)))
    for peer in peers_of(op.name):
        if peers and peer.name not in peers:
            continue
        reason = peer.absence(device)
        if reason is not None:
            absent[peer.name] = reason
        else:
            found.append(Candidate(peer.name, peer.kind, peer.version or "", peer.build))
    if twice := [name for name, count in Counter(one.name for one in found).items() if count > 1]:
        raise UserError(f"{op.name} has two candidates called {twice[0]!r}; name the peer differently")
    return found, absent


def _ours(op: Operation, device: str, backends: Sequence[str]) -> tuple[list[Candidate], dict[str, str]]:
    version = evakernels.info()["evakernels"] or ""
    if op.registered is None:
        return _composed(op, backends, version), {}
    here = [backend for backend in SERVED[device] if not backends or backend in backends]
    reasons = {backend: why_not(op.registered, backend) for backend in here}
    found = [_on_backend(op, backend, version) for backend, why in reasons.items() if not why]
    absent = {f"{OURS} {backend}": "; ".join(why) for backend, why in reasons.items() if why}
    return found, absent


def _composed(op: Operation, backends: Sequence[str], version: str) -> list[Candidate]:
    """A composition of ops with the backends that each of them chooses, and with the references."""
    found = []
    if set(backends) != {"reference"}:
        ways = {OURS: op.ours, **{f"{OURS} {name}": function for name, function in op.variants.items()}}
        found += [Candidate(name, "ours", version, _always(function)) for name, function in ways.items()]
    if "reference" in backends or (op.references and not backends):
        found.append(_on_backend(op, "reference", version))
    return found


def _always(function: Function) -> Callable[[Any], Function]:
    return lambda shape: function


def _on_backend(op: Operation, backend: str, version: str) -> Candidate:
    context = partial(evakernels.use_backend, backend)
    return Candidate(f"{OURS} {backend}", "ours", version, _always(op.ours), context)


def check_names(chosen: Sequence[Operation], device: str, backends: Sequence[str], peers: Sequence[str]) -> None:
    """Raises `UserError` for a backend that the device type has not, or a peer that no operation of `chosen` knows."""
    known = [name for op in chosen for name in (op.baseline.name, *(peer.name for peer in peers_of(op.name)))]
    for kind, given, accepted in (
        (f"{device} backend", backends, SERVED[device]),
        ("peer", peers, [*known, COMPILE, NOBODY]),
    ):
        for name in given:
            if name not in accepted:
                raise unknown_name(kind, name, accepted)


def compiled(function: Function) -> Function:
    """`torch.compile` for one shape; the function is called by keyword."""
    # What earlier runs left on disk would make the first call look cheap.
    torch.compiler.config.force_disable_caches = True
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")

    def fresh(**inputs: Any) -> Any:
        return function(**inputs)

    # torch counts the compiled forms of each code object and stops at eight; so each case gets one of its own.
    fresh.__code__ = fresh.__code__.replace()
    return torch.compile(fresh, fullgraph=True, dynamic=False)
