"""LAMB with the trust ratios that an optimizer inside DeepSpeed's ZeRO-1 or ZeRO-2 sees: one for each process's slice
of a group's parameters. The released models were trained so.

These stages put the parameters of a group one behind the other, pad them with zeros to a multiple of twice the number
of processes, and give each process an equal slice as the one parameter of its group (deepspeed/runtime/zero/
stage_1_and_2.py: `flatten_dense_tensors_aligned`, `get_data_parallel_partitions`). So the norms are those of a slice,
which begins and ends anywhere in a tensor. Here the slices are cut out of the parameters as views.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from evakernels import lamb_apply, lamb_update
from evakernels.ops._shards import first_element_of, sum_over
from evakernels.optim import Lamb
from evakernels.optim._device_optimizer import Batch

_ALIGNMENT = 2


class ZeroLamb(Lamb):
    """`evakernels.optim.Lamb`, variant `"deepspeed"`, for repeating a run of DeepSpeed on any number of processes.

    Args:
        params, options: as `Lamb` has them, without `variant`.
        zero_processes: of the run that is repeated, 1 or more. Each step handles up to so many more views a group.

    Raises:
        TypeError, ValueError: as `Lamb`; and in `step` for a group of which some parameters alone have gradients, and
            for tensors that aren't contiguous.
    """

    shared_options: ClassVar[tuple[str, ...]] = (*Lamb.shared_options, "zero_processes")

    def __init__(self, params: ParamsT, *, zero_processes: int, **options: Any) -> None:
        groups: list[dict[str, Any]] = [
            dict(group) if isinstance(group, dict) else {"params": [group]} for group in params
        ]
        for group in groups:
            group.setdefault("zero_processes", zero_processes)
        super().__init__(groups, **options)

    def check_options(self, options: dict[str, Any]) -> None:
        if options["zero_processes"] < 1:
            raise ValueError(f"ZeroLamb: zero_processes is {options['zero_processes']}; accepted: 1 or more")
        if options["variant"] != "deepspeed":
            raise ValueError(f"ZeroLamb: variant is {options['variant']!r}; accepted: 'deepspeed'")
        super().check_options(options)

    def parts_of(self, batch: Batch) -> Iterator[Batch]:
        """All at once, as a trust ratio is that of several tensors."""
        return iter([batch])

    def step_batch(
        self, batch: Batch, options: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        options = {**options, "found_inf": found_inf}
        pieces = cut(batch, self.param_groups, options.pop("zero_processes"))
        batch = pieces.batch
        rounding: dict[str, Any] = {"seeds": batch.seeds, "first_elements": batch.first_elements}
        norms = lamb_update(
            batch.params, batch.grads, *batch.state, batch.weight_decays, grad_scale=grad_scale, **options
        )
        norms = pieces.sum_over_slices(norms)
        rates = batch.lrs, batch.weight_decays
        lamb_apply(batch.params, *batch.state, norms, *rates, **options | rounding)


class Piece(NamedTuple):
    """What of one tensor of a batch lies in one slice: elements [begin, end) of what this process holds."""

    tensor: int
    begin: int
    end: int
    slice: int


@dataclass(frozen=True)
class Pieces:
    """The tensors of a batch, cut where slices end, in the order of the slices.

    Attributes:
        counts: pieces of each slice of each of the optimizer's groups, on the device.
        batch: the pieces as tensors. Each has a step count of its own; those of a tensor's later pieces are copies.
    """

    batch: Batch
    counts: Tensor

    def sum_over_slices(self, squared_norms: Tensor) -> Tensor:
        """The norms of each piece's slice, over all processes, from those of the pieces; both `[pieces, 2]`."""
        # To the same bits in every run, which index_add isn't on a GPU.
        sums = torch.segment_reduce(squared_norms, "sum", lengths=self.counts, initial=0.0, unsafe=True)
        sum_over(sums, self.batch.shards)
        return sums.repeat_interleave(self.counts, dim=0, output_size=len(squared_norms))


def cut(batch: Batch, groups: Sequence[dict[str, Any]], processes: int) -> Pieces:
    """The pieces of a batch.

    Args:
        groups: the optimizer's.
        processes: of the run whose slices these are.

    Raises:
        ValueError: for a group of which the batch has a part only, and for tensors that aren't contiguous.
    """
    pieces = list(_pieces(batch, groups, processes))
    result = Batch(shards=batch.shards)
    for piece in pieces:
        _add(result, batch, piece)
    counts = torch.zeros(len(groups) * processes, dtype=torch.int64)
    counts.index_add_(0, torch.tensor([p.slice for p in pieces]), torch.ones(len(pieces), dtype=torch.int64))
    return Pieces(result, counts.to(batch.params[0].device))


def _pieces(batch: Batch, groups: Sequence[dict[str, Any]], processes: int) -> Iterator[Piece]:
    given = {id(param): i for i, param in enumerate(batch.owners)}
    for number, group in enumerate(groups):
        members = [given.get(id(param)) for param in group["params"]]
        if all(i is None for i in members):
            continue
        first, total = 0, sum(param.numel() for param in group["params"])
        size = _ALIGNMENT * -(-total // (_ALIGNMENT * processes))
        for param, i in zip(group["params"], members, strict=True):
            if i is None:
                raise ValueError(
                    f"ZeroLamb: of a group all parameters must have gradients, lie on one device and "
                    f"be sharded alike; that isn't so of parameter group {number}"
                )
            begin = first + first_element_of(param)
            yield from _pieces_of(i, begin, batch.params[i].numel(), size, number * processes)
            first += param.numel()


def _pieces_of(tensor: int, begin: int, count: int, size: int, first_slice: int) -> Iterator[Piece]:
    """Of `count` elements from `begin` on, in a row of slices of this size; one without elements if there are none."""
    at = 0
    while True:
        number, place = divmod(begin + at, size)
        # What is held of a tensor's end may be nothing at all, behind the last slice.
        end = min(count, at + size - place)
        yield Piece(tensor, at, end, first_slice + number - (place == 0 and count == 0 and number > 0))
        at = end
        if at >= count:
            return


def _add(result: Batch, batch: Batch, piece: Piece) -> None:
    i, part = piece.tensor, slice(piece.begin, piece.end)
    for values, of in (
        (result.params, batch.params),
        (result.exp_avgs, batch.exp_avgs),
        (result.exp_avg_sqs, batch.exp_avg_sqs),
    ):
        if not of[i].is_contiguous():
            raise ValueError(f"ZeroLamb: tensors must be contiguous, given strides {of[i].stride()}")
        values.append(of[i].view(-1)[part])
    result.grads.append(batch.grads[i].reshape(-1)[part])
    result.steps.append(batch.steps[i] if piece.begin == 0 else batch.steps[i].clone())
    result.lrs.append(batch.lrs[i])
    result.weight_decays.append(batch.weight_decays[i])
    if batch.seeds:
        result.seeds.append(batch.seeds[i])
        result.first_elements.append(batch.first_elements[i] + piece.begin)
