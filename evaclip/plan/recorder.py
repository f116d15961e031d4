"""Records which storages live, what operators compute and what collectives send, while a step runs."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from evaclip.weights import is_dtensor
from evakernels import _logit_gradients

PARAMETERS, FROZEN, CASTS, GRADIENTS = "parameters", "frozen weights", "weights in 16 bits", "gradients"
WHOLE_GRADIENTS = "whole gradients of micro-batches"
OPTIMIZER, AVERAGE, INPUTS, HOST = "optimizer state", "averaged weights", "inputs", "host memory"
COMMUNICATION, WORKING = "communication", "working memory"
STAGES = ("teacher", "forward", "backward", "recomputation")
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")

Amounts = Counter[str]


@dataclass(frozen=True)
class Phase:
    """A part of a step.

    Attributes:
        name: `image.block.0`, in the backward pass `~image.block.0`.
        number: how many forward passes began before or with it.
        change: bytes by kind at its end minus those at its beginning.
        peak: bytes by kind at its highest moment minus those at its beginning.
        costs: FLOPs by stage, bytes that each collective receives, and `bytes` that operators read and write.
    """

    name: str
    number: int
    change: Amounts
    peak: Amounts
    costs: Amounts


class Recorder(TorchDispatchMode):
    """Records every operator inside its `with` block, on fake or real tensors.

    A storage counts once, from the operator that returns it until nothing refers to it. Memory that an operator
    allocates and frees internally isn't seen, except the workspace of the contrastive loss.
    """

    def __init__(self, kinds: dict[str, Iterable[Tensor]], opening: str) -> None:
        """
        Args:
            kinds: tensors that exist before the step, by kind. `HOST` isn't counted.
            opening: phase with which each forward pass begins.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._kinds: list[str] = []
        self._sizes: list[int] = []
        self._changes: list[tuple[int, int]] = []
        self._costs: list[Amounts] = [Counter()]
        self._marks: list[tuple[str, int]] = []
        self._known: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._gathered: dict[int, Any] = {}
        self._opening = opening
        for kind, tensors in kinds.items():
            for tensor in tensors:
                self._know(tensor, kind)

    def mark(self, name: str) -> None:
        """Begins a phase."""
        self._marks.append((name, len(self._changes)))
        self._costs.append(Counter())

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Sets the kind of the tensors' storages, also for the time before this call."""
        for tensor in tensors:
            self._kinds[self._know(tensor, kind)] = kind

    def phases(self) -> tuple[Amounts, list[Phase]]:
        """Bytes by kind before the first phase, and the phases.

        Optimizer state counts from the start, although the first step creates it at its end.
        """
        kinds = self._final_kinds()
        changes = [(kinds[index], size) for index, size in self._changes]
        start: Amounts = Counter()
        for kind, size in changes[: self._marks[0][1]]:
            start[kind] += size
        late = [(kind, size) for kind, size in changes[self._marks[0][1] :] if kind == OPTIMIZER]
        start[OPTIMIZER] += sum(size for _, size in late)
        phases, number = [], 0
        bounds = pairwise([*(place for _, place in self._marks), len(changes)])
        for (name, _), (first, end), costs in zip(self._marks, bounds, self._costs[1:], strict=True):
            number += name == self._opening
            change: Amounts = Counter()
            peak, highest, total = Counter(change), 0, 0
            for kind, size in changes[first:end]:
                if kind not in (HOST, OPTIMIZER):
                    change[kind] += size
                    total += size
                    if total > highest:
                        peak, highest = Counter(change), total
            phases.append(Phase(name, number, change, peak, costs))
        del start[HOST]
        return start, phases

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for index, storage in self._gathered.items():
            # Sharding frees and allocates gathered parameters by resizing their storages, which is not an operator.
            self._resize(index, storage.nbytes())
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        casts = func is torch.ops.aten._to_copy.default and self._kind_of(args[0]) == PARAMETERS
        for tensor in outputs:
            self._know(tensor, CASTS if casts else "")
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
                index = self._know(tensor, "")
                self._kinds[index] = self._kinds[index] or COMMUNICATION
                if name == "split_with_sizes_copy":
                    self._gathered[index] = local(tensor).untyped_storage()
        starts = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}
        collective = next((value for start, value in starts.items() if name.strip("_").startswith(start)), None)
        if collective:
            size = max(sum(_size(x) for x in tree_leaves(arg) if isinstance(x, Tensor)) for arg in args[:2])
            group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
            ranks = dist.ProcessGroup.unbox(group).size()
            self._costs[-1][collective] += (1 + (collective == "all-reduce")) * size * (ranks - 1) // ranks

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, tensors: list[Tensor]) -> None:
        packet, costs = func._overloadpacket, self._costs[-1]
        name = packet.__name__
        if not (func.is_view or name.startswith(("empty", "new_empty", "detach", "alias", "_unsafe_view"))):
            costs["bytes"] += sum(_size(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())
        if name in _LOGIT_GRADIENTS:
            image, text = args[_LOGIT_GRADIENTS[name] :][:2]
            row_bytes = image.itemsize * len(text)  # of gradients of the logits
            workspace = row_bytes * min(len(image), _logit_gradients.rows_of_chunk(row_bytes))
            self._kinds.append(WORKING)
            self._sizes.append(0)
            self._resize(len(self._sizes) - 1, workspace)
            self._resize(len(self._sizes) - 1, 0)
        formula = FLOPS.get(packet)
        if formula:
            # The backward pass itself builds no graph, and our own forward ops run in it for recomputation alone.
            in_backward = torch._C._current_graph_task_id() >= 0
            again = in_backward and (torch.is_grad_enabled() or name.endswith("_forward"))
            is_teacher = bool(self._marks) and self._marks[-1][0] == "teacher"
            stage = "recomputation" if again else "backward" if in_backward else "forward"
            costs["teacher" if is_teacher else stage] += formula(*args, **kwargs, out_val=result)

    def _know(self, tensor: Tensor, kind: str) -> int:
        storage = local(tensor).untyped_storage()
        index = self._known.get(id(storage))
        if index is None:
            index = len(self._sizes)
            self._known[id(storage)] = index
            self._kinds.append(kind)
            self._sizes.append(0)
            self._references[index] = weakref.ref(storage, self._forget(id(storage), index))
            self._resize(index, storage.nbytes())
        return index

    def _kind_of(self, tensor: Tensor) -> str:
        index = self._known.get(id(local(tensor).untyped_storage()))
        return "" if index is None else self._kinds[index]

    def _forget(self, key: int, index: int) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self._references.pop(index, None)
            self._resize(index, 0)

        return freed

    def _resize(self, index: int, size: int) -> None:
        if size != self._sizes[index]:
            self._changes.append((index, size - self._sizes[index]))
            self._sizes[index] = size

    def _final_kinds(self) -> list[str]:
        """Kinds of all storages; those without a label get one from the phases in which they begin and end."""
        self._references.clear()  # later frees aren't part of the step
        names, passes = [""], [0]
        for name, _ in self._marks:
            names.append(name)
            passes.append(passes[-1] + (name == self._opening))
        born: dict[int, int] = {}
        died: dict[int, int] = {}
        phase = 0
        for place, (index, size) in enumerate(self._changes):
            while phase < len(self._marks) and place >= self._marks[phase][1]:
                phase += 1
            born.setdefault(index, phase)
            if size < 0:
                died[index] = phase
        kinds = []
        for index, kind in enumerate(self._kinds):
            first = born.get(index, 0)
            last = died.get(index, len(self._marks) + 1)
            name = names[first]
            if not kind and last > first and name.partition(".")[0] in ("image", "text"):
                kind = f"activations of the {name.partition('.')[0]} tower"
            elif not kind and name.startswith("~") and last < len(passes) and passes[last] > passes[first]:
                kind = WHOLE_GRADIENTS
            kinds.append(kind or WORKING)
        return kinds


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
