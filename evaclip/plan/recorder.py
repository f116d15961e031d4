"""Records which storages live, what operators compute and what collectives send, while a step runs."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from evaclip.plan.gpus import PER_NODE
from evaclip.weights import is_dtensor
from evakernels import _logit_gradients

PARAMETERS, FROZEN, CASTS, GRADIENTS = "parameters", "frozen weights", "weights in 16 bits", "gradients"
WHOLE_GRADIENTS = "whole gradients of micro-batches"
OPTIMIZER, AVERAGE, INPUTS, HOST = "optimizer state", "averaged weights", "inputs", "host memory"
COMMUNICATION, WORKING = "communication", "working memory"
STAGES = ("teacher", "forward", "backward", "recomputation")
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")
IN_NODE, NETWORK = "from the node", "from other nodes"

Amounts = Counter[str]


@dataclass(eq=False)
class Storage:
    """A storage's kind of memory ("" if unlabelled), its bytes, and the phases of its allocation and its last free."""

    kind: str
    first: int
    size: int = 0
    last: int | None = None


@dataclass
class Phase:
    """A part of a step.

    Attributes:
        name: `image.block.0`, in the backward pass `~image.block.0`.
        number: forward passes that began before or with it.
        changes: allocated (positive) and freed (negative) bytes, in order.
        costs: FLOPs by stage, bytes received by collective and by link, and `bytes` that operators read and write.
    """

    name: str
    number: int
    changes: list[tuple[Storage, int]] = field(default_factory=list)
    costs: Amounts = field(default_factory=Counter)

    def sizes(self) -> list[tuple[str, int]]:
        """Kind and bytes of each change."""
        return [(storage.kind, size) for storage, size in self.changes]


class Recorder(TorchDispatchMode):
    """Records every operator inside its `with` block, on fake or real tensors.

    A storage counts once, from the operator that returns it until nothing refers to it. Memory that an operator
    allocates and frees internally isn't counted, except the workspace of the contrastive loss.
    """

    def __init__(self, kinds: dict[str, Iterable[Tensor]], opening: str) -> None:
        """
        Args:
            kinds: tensors that exist before the step, by kind. `HOST` isn't counted.
            opening: phase with which each forward pass begins.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._phases = [Phase("", 0)]
        self._opening = opening
        self._storages: dict[int, Storage] = {}
        self._gathered: list[tuple[Storage, Any]] = []
        for kind, tensors in kinds.items():
            self.label(tensors, kind)

    def mark(self, name: str) -> None:
        """Begins a phase."""
        self._phases.append(Phase(name, self._phases[-1].number + (name == self._opening)))

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Sets the kind of the tensors' storages, also for the time before this call."""
        for tensor in tensors:
            self._storage(tensor).kind = kind

    def finish(self) -> tuple[Amounts, list[Phase]]:
        """Bytes by kind before the first phase, and the phases, in which each storage has a kind.

        Optimizer state counts from the start, although the first step creates it at its end.
        """
        phases, self._phases = self._phases, [Phase("", 0)]  # later frees aren't part of the step
        start: Amounts = Counter()
        for index, phase in enumerate(phases):
            for storage, size in phase.changes:
                storage.kind = storage.kind or _kind(storage, phases)
                if index == 0 or storage.kind == OPTIMIZER:
                    start[storage.kind] += size
            phase.changes = [change for change in phase.changes if change[0].kind not in (HOST, OPTIMIZER)]
        del start[HOST]
        return start, phases[1:]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for storage, memory in self._gathered:
            # Sharding frees and allocates gathered parameters by resizing their storages, which is not an operator.
            self._resize(storage, memory.nbytes())
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        casts = func is torch.ops.aten._to_copy.default and self._kind_of(args[0]) == PARAMETERS
        for tensor in outputs:
            self._storage(tensor, CASTS if casts else "")
        if func.namespace in ("c10d", "fsdp"):
            self._communicate(func, args, kwargs, result)
        else:
            self._count(func, args, kwargs, result, [*inputs, *outputs])
        return result

    def _communicate(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func._overloadpacket.__name__
        written = kwargs.get("out", args[0] if func.namespace == "c10d" else result)
        for tensor in tree_leaves(written):
            if isinstance(tensor, Tensor):
                storage = self._storage(tensor)
                storage.kind = storage.kind or COMMUNICATION
                if name == "split_with_sizes_copy":
                    self._gathered.append((storage, local(tensor).untyped_storage()))
        starts = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}
        collective = next((value for start, value in starts.items() if name.strip("_").startswith(start)), None)
        if collective:
            size = max(sum(_size(x) for x in tree_leaves(arg) if isinstance(x, Tensor)) for arg in args[:2])
            group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
            ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
            self._phases[-1].costs.update(communication(collective, size, ranks))

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, tensors: list[Tensor]) -> None:
        packet, phase = func._overloadpacket, self._phases[-1]
        name = packet.__name__
        if not (func.is_view or name.startswith(("empty", "new_empty", "detach", "alias", "_unsafe_view"))):
            phase.costs["bytes"] += sum(_size(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())
        if name in _LOGIT_GRADIENTS:
            image, text = args[_LOGIT_GRADIENTS[name] :][:2]
            row_bytes = image.itemsize * len(text)  # of gradients of the logits
            workspace = row_bytes * min(len(image), _logit_gradients.rows_of_chunk(row_bytes))
            phase.changes += [(Storage(WORKING, 0), size) for size in (workspace, -workspace)]
        if formula := FLOPS.get(packet):
            # The backward pass itself builds no graph, and our own forward ops run in it for recomputation alone.
            again = in_backward() and (torch.is_grad_enabled() or name.endswith("_forward"))
            stage = "recomputation" if again else "backward" if in_backward() else "forward"
            phase.costs["teacher" if phase.name == "teacher" else stage] += formula(*args, **kwargs, out_val=result)

    def _storage(self, tensor: Tensor, kind: str = "") -> Storage:
        """The record of a tensor's storage; a new one has this kind."""
        memory = local(tensor).untyped_storage()
        storage = self._storages.get(id(memory))
        if storage is None:
            storage = self._storages[id(memory)] = Storage(kind, len(self._phases) - 1)
            weakref.finalize(memory, self._free, id(memory)).atexit = False
            self._resize(storage, memory.nbytes())
        return storage

    def _kind_of(self, tensor: Tensor) -> str:
        storage = self._storages.get(id(local(tensor).untyped_storage()))
        return "" if storage is None else storage.kind

    def _free(self, key: int) -> None:
        self._resize(self._storages.pop(key), 0)

    def _resize(self, storage: Storage, size: int) -> None:
        if size != storage.size:
            self._phases[-1].changes.append((storage, size - storage.size))
            storage.last = len(self._phases) - 1 if size < storage.size else storage.last
            storage.size = size


def communication(collective: str, size: int, ranks: Sequence[int]) -> Amounts:
    """Bytes that each rank receives in a ring over these ranks: by the collective, and by the link.

    A ring enters a node once through the network cards of all its ranks, which share the bytes.

    Args:
        size: bytes of the whole tensor.
        ranks: of the group, `PER_NODE` consecutive ones in a node.
    """
    received = (1 + (collective == "all-reduce")) * size * (len(ranks) - 1) // len(ranks)
    nodes = Counter(rank // PER_NODE for rank in ranks)
    network = received // max(nodes.values()) if len(nodes) > 1 else 0
    return Counter({collective: received, IN_NODE: received - network, NETWORK: network})


def in_backward() -> bool:
    """Whether autograd computes gradients or recomputes activations."""
    return torch._C._current_graph_task_id() >= 0


def _kind(storage: Storage, phases: list[Phase]) -> str:
    """The kind of an unlabelled storage, by the phases in which it is allocated and freed."""
    first, last = phases[storage.first], storage.last
    tower = first.name.partition(".")[0]
    if tower in ("image", "text") and (last is None or last > storage.first):
        return f"activations of the {tower} tower"
    if tower.startswith("~") and last is not None and phases[last].number > first.number:
        return WHOLE_GRADIENTS
    return WORKING


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _rope_attention(q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    batch, queries, heads, channels = q.shape
    return 4 * batch * heads * queries * k.shape[1] * channels


def _packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *_: Any, **__: Any) -> int:
    # Exact for captions of equal length; the lengths are data, which the trace doesn't have.
    tokens, heads, channels = q.shape
    return 4 * heads * channels * tokens * tokens // max(len(cu_seqlens) - 1, 1)


def _swiglu_mlp(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, *_: Any, **__: Any) -> int:
    return 2 * (x.numel() // x.shape[-1]) * (w1.numel() + w2.numel() + w3.numel())


def _swiglu_mlp_backward(dout: Tensor, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, *rest: Any, **_: Any) -> int:
    needs_grad = rest[-1]
    of_inputs = (
        w3.numel() * (any((*needs_grad[:3], *needs_grad[4:6], *needs_grad[7:])))
        + (w1.numel() + w2.numel()) * needs_grad[0]
    )
    of_weights = sum(w.numel() for w, needed in zip((w1, w2, w3), needs_grad[1:4], strict=True) if needed)
    return int(2 * (x.numel() // x.shape[-1]) * (of_inputs + of_weights))


_LOGIT_GRADIENTS = {"contrastive_backward": 3, "siglip_forward": 0}
"""Ops that compute gradients of logits, and the index of their image features."""


def _contrastive(gemms: int) -> Callable[..., int]:
    """FLOPs of `gemms` products of the logits' size."""
    return lambda image, text, *_, **__: gemms * 2 * len(image) * len(text) * image.shape[1]


def _contrastive_backward(*args: Any, **_: Any) -> int:
    image, text, logits = args[3], args[4], args[8]
    return _contrastive(3 if logits is None else 2)(image, text)


def _siglip_forward(*args: Any, **_: Any) -> int:
    needs_grad = args[5]
    return _contrastive(3 if any(needs_grad) else 1)(*args)


# The backward pass of attention has 5 GEMMs to the 2 of the forward pass, as torch counts its own attention.
_aten, _ops = torch.ops.aten, torch.ops.evakernels
_flash = "_scaled_dot_product_flash_attention"
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    getattr(_aten, f"{_flash}_for_cpu"): flop_registry[getattr(_aten, _flash)],
    getattr(_aten, f"{_flash}_for_cpu_backward"): flop_registry[getattr(_aten, f"{_flash}_backward")],
    _ops.rope_attention_forward: _rope_attention,
    _ops.rope_attention_backward: lambda dout, q, k, *_, **__: 5 * _rope_attention(q, k) // 2,
    _ops.packed_attention_forward: _packed_attention,
    _ops.packed_attention_backward: lambda dout, q, *rest, **__: 5 * _packed_attention(q, q, q, rest[4]) // 2,
    _ops.swiglu_mlp_forward: _swiglu_mlp,
    _ops.swiglu_mlp_backward: _swiglu_mlp_backward,
    _ops.contrastive_forward: _contrastive(1),
    _ops.contrastive_backward: _contrastive_backward,
    _ops.siglip_forward: _siglip_forward,
}
"""FLOPs by operator, two for a MAC; called with the operator's arguments and `out_val`."""
