"""One optimizer step of any task: loss and gradients, their mean over ranks, a guarded update."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from evaclip.data.loader import Batch, rank_rows
from evaclip.train.config import Precision
from evaclip.train.distributed import GradientMean, World, accumulate_in_float32
from evaclip.train.micro_batch import MicroBatch, StepContext, upload
from evaclip.train.sharding import AUTOCAST, synchronize_gradients
from evaclip.train.tasks.task import Task
from evaclip.transforms import Normalization
from evaclip.weights import is_sharded
from evakernels import gradient_norm, sample_token_index

_ROWS_PER_DRAW = 256


@dataclass(frozen=True)
class StepOptions:
    """Options of one optimizer step.

    Attributes:
        accumulation_steps: micro-batches per step and rank.
        grad_clip_norm: maximum global L2 norm of the gradients; None disables clipping.
        seed: seed of token dropout.
        first_row: index of this rank's first row in the global batch.
        batch_size: global batch size; None if all ranks have equal local batches.
        together: number of consecutive rows that stay in one micro-batch.
        reduce_each_micro_batch: reduce-scatter after every micro-batch instead of only the last.
    """

    precision: Precision = "fp32"
    accumulation_steps: int = 1
    grad_clip_norm: float | None = None
    seed: int = 0
    first_row: int = 0
    batch_size: int | None = None
    together: int = 1
    reduce_each_micro_batch: bool = False


@dataclass(frozen=True)
class StepResult:
    """0-D tensors on the device, which the caller may read.

    Attributes:
        loss: mean over the global batch.
        grad_norm: L2 norm of all gradients before clipping.
        tower_norms: L2 norm of each tower's gradients, by name.
        found_inf: 1 if the loss or a gradient was not finite and the update was skipped, else 0.
        updates: for each tower `[2]`, the L2 norm of its weights' change, and its ratio to the weights' norm; None
            without `measure`.
        measures: other metrics of the task by their names in the log; None without `measure`.
    """

    loss: Tensor
    grad_norm: Tensor
    tower_norms: dict[str, Tensor]
    found_inf: Tensor
    updates: dict[str, Tensor] | None = None
    measures: dict[str, Tensor] | None = None

    def named(self) -> dict[str, Tensor]:
        """All but loss, norm and `found_inf` by their names in the log."""
        norms = {f"grad_norm_{tower}": norm for tower, norm in self.tower_norms.items()}
        for tower, values in (self.updates or {}).items():
            norms[f"update_norm_{tower}"], norms[f"update_ratio_{tower}"] = values.unbind()
        return {**(self.measures or {}), **norms}


class TrainStep:
    """Trains a task's model on one batch per call, without waiting for the device.

    1. The task runs all micro-batches forward and backward; during the last backward pass gradients are averaged over
       ranks.
    2. Clipping and loss scale become one divisor of the gradients, the optimizer's `grad_scale`.
    3. The optimizer updates the weights. It skips the update on the device if the loss or a gradient is not finite
       (`found_inf`).
    """

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer, options: StepOptions, world: World) -> None:
        self.task = task
        self.optimizer: Any = optimizer
        self.options = options
        self.world = world
        self.parameters: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        towers: dict[str, list[Tensor]] = {name: list(tower.parameters()) for name, tower in task.towers.items()}
        in_towers = {id(parameter) for parameters in towers.values() for parameter in parameters}
        self._groups = {**towers, "rest": [value for value in self.parameters if id(value) not in in_towers]}
        if options.accumulation_steps > 1:
            accumulate_in_float32(self.parameters, reduce_each_micro_batch=options.reduce_each_micro_batch)
        self._locked = [module for module in task.model.modules() if _is_locked(module)]
        self.mean = GradientMean([p for tower in towers.values() for p in tower], self._groups["rest"], world)
        # Shards are gathered in the 16-bit type, so that there is nothing left to cast.
        self.autocast_dtype = None if is_sharded(task.model) else AUTOCAST.get(options.precision)
        stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        normalize = Normalization(task.preprocess, world.device)
        self._upload = partial(upload, device=world.device, stream=stream, normalize=normalize)
        # Called before weights, moments and counters change.
        self.before_update: Callable[[], None] = lambda: None
        self.loss_scale = LossScale(world.device, enabled=options.precision == "amp_fp16")
        self.skipped = torch.zeros((), dtype=torch.int64, device=world.device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=world.device)

    def __call__(self, batch: Batch, step: int, *, measure: bool = False) -> StepResult:
        """Runs forward, backward and update on one batch.

        Args:
            batch: this rank's rows, with targets of the task, in host memory: otherwise the host waits for the device.
                uint8 images are normalised. Each micro-batch is copied while the one before is computed, from pinned
                memory without a wait.
            step: index of the step, from 0; decides which patches are kept.
            measure: also return metrics of the task and norms of the weights' changes; the step stays bit-equal.
        """
        self.task.model.train()
        for module in self._locked:
            module.eval()
        self.optimizer.zero_grad(set_to_none=True)
        measures = self.task.backward(self._context(batch, measure, step))
        self.mean.finish()
        loss = self.world.mean_(measures.pop("loss").detach().clone())
        tower_norms = self._tower_norms()
        grad_norm: Tensor = torch.linalg.vector_norm(torch.stack(list(tower_norms.values())))
        found_inf, moved = self._update(loss, grad_norm, measure)
        # A tower that isn't trained has no gradients.
        norms = {name: tower_norms.get(name, torch.zeros_like(grad_norm)) for name in self.task.towers}
        if not measure:
            return StepResult(loss, grad_norm, norms, found_inf)
        updates = {name: self._tower_update(name, moved) for name in self.task.towers}
        measures = {name: self.world.mean_(value) for name, value in measures.items()} | self.task.measures()
        return StepResult(loss, grad_norm, norms, found_inf, updates, measures)

    def state_dict(self) -> dict[str, Any]:
        """All but the weights and the optimizer's moments."""
        return {
            "loss_scale": self.loss_scale.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss_scale.load_state_dict(state["loss_scale"])
        self.skipped.copy_(state["skipped"])
        self.skipped_in_a_row.copy_(state["skipped_in_a_row"])

    def _context(self, batch: Batch, measure: bool, step: int) -> StepContext:
        options, count = self.options, len(batch)
        steps = options.accumulation_steps
        if (lengths := batch.lengths) is not None:
            kept = None  # the loader has dropped patches
            ranges = split_by_tokens(lengths, steps)
        else:
            kept = self._kept_tokens(count, step)
            ranges = [rank_rows(count, index, steps, options.together) for index in range(steps)]
        micro_batches = []
        for each in ranges:
            rows = slice(each.start, each.stop)
            tokens = None if kept is None else kept[rows]
            micro_batches.append(MicroBatch(rows, batch.targets[rows], tokens, step, options.first_row + rows.start))
        return StepContext(
            micro_batches=micro_batches,
            batch=batch,
            upload=self._upload,
            device=self.world.device,
            measure=measure,
            autocast_dtype=self.autocast_dtype,
            loss_scale=self.loss_scale.scale,
            share=self.world.size / (options.batch_size or count * self.world.size),
            begin_backward=self._begin_backward,
        )

    def _begin_backward(self, is_last: bool) -> None:
        reduce = is_last or self.options.reduce_each_micro_batch
        synchronize_gradients(self.task.towers.values(), reduce=reduce, is_last=is_last)
        if is_last:
            self.mean.begin()

    def _kept_tokens(self, count: int, step: int) -> Tensor | None:
        visual, options = self.task.visual, self.options
        if not visual.patch_dropout:
            return None
        rows = range(options.first_row, options.first_row + count)
        return token_index((options.seed, step), rows, visual.num_patches, visual.num_kept_patches(), self.world.device)

    @torch.no_grad()
    def _tower_norms(self) -> dict[str, Tensor]:
        """Norms of the gradients of each tower, and of parameters outside the towers."""
        return {
            name: gradient_norm(gradients).to(self.world.device) / self.loss_scale.scale
            for name, parameters in self._groups.items()
            if (gradients := [p.grad for p in parameters if p.grad is not None])
        }

    @torch.no_grad()
    def _update(self, loss: Tensor, grad_norm: Tensor, measure: bool) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """Updates the weights unless a number isn't finite; the squared norms of each parameter and its change."""
        scale, limit = self.loss_scale.scale, self.options.grad_clip_norm
        found_inf = (~(loss.isfinite() & grad_norm.isfinite())).float()
        self.optimizer.found_inf = found_inf
        self.optimizer.grad_scale = scale if self.loss_scale.enabled else None
        if limit is not None:
            self.optimizer.grad_scale = scale * (grad_norm / limit).clamp(min=1.0)
        moved: dict[Tensor, Tensor] = {}
        self.before_update()
        if measure:
            moved = self.optimizer.measured_step()
        else:
            self.optimizer.step()
        self.loss_scale.update(found_inf)
        self.skipped += found_inf.long()
        self.skipped_in_a_row.copy_(torch.where(found_inf > 0, self.skipped_in_a_row + 1, 0))
        self.task.after_update()
        return found_inf, moved

    @torch.no_grad()
    def _tower_update(self, name: str, moved: dict[Tensor, Tensor]) -> Tensor:
        squares = [moved[parameter] for parameter in self._groups[name] if parameter in moved]
        if not squares:
            return torch.zeros(2, device=self.world.device)
        weights, change = torch.stack(squares).sum(0).sqrt().unbind()
        return torch.stack([change, change / weights]).to(self.world.device)


class LossScale:
    """Dynamic loss scale by the rule of `torch.amp.GradScaler`, in tensors.

    `GradScaler.step` reads its overflow flag on the host for optimizers other than torch's; here the flag stays on the
    device, where the optimizer obeys it.

    Args:
        device: of the scale.
        enabled: False keeps the scale at 1.
        initial: the first scale.
        growth_interval: steps without an overflow after which the scale doubles.
    """

    def __init__(
        self, device: torch.device, enabled: bool, *, initial: float = 2.0**16, growth_interval: int = 2000
    ) -> None:
        self.enabled = enabled
        self.growth_interval = growth_interval
        self.scale = torch.full((), initial if enabled else 1.0, device=device)
        self.clean_steps = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Halves the scale after an overflow (`found_inf` is 1), doubles it after `growth_interval` clean steps."""
        if not self.enabled:
            return
        overflow = found_inf > 0
        clean = torch.where(overflow, 0, self.clean_steps + 1)
        grow = clean >= self.growth_interval
        scale = (self.scale * torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0))).clamp(min=1.0)
        self.scale.copy_(torch.where(scale.isfinite(), scale, self.scale))
        self.clean_steps.copy_(torch.where(grow, 0, clean))

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "clean_steps": self.clean_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale.copy_(state["scale"])
        self.clean_steps.copy_(state["clean_steps"])


def _is_locked(module: nn.Module) -> bool:
    """Whether the module has parameters and none is trained; dropout and stochastic depth are off in it."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def token_index(key: tuple[int, ...], rows: range, num_tokens: int, num_keep: int, device: torch.device) -> Tensor:
    """Patches that patch dropout keeps in these rows of the global batch: int64 [len(rows), num_keep], ascending.

    Each block of rows has its own generator, so the result doesn't depend on the number of ranks.

    Args:
        key: seed and step.
        rows: consecutive rows.
    """
    first, last = rows.start // _ROWS_PER_DRAW, (rows.stop - 1) // _ROWS_PER_DRAW
    blocks = []
    for block in range(first, last + 1):
        digest = hashlib.blake2b(repr((*key, block)).encode(), digest_size=8).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
        blocks.append(sample_token_index(_ROWS_PER_DRAW, num_tokens, num_keep, generator=generator, device=device))
    offset = first * _ROWS_PER_DRAW
    return torch.cat(blocks)[rows.start - offset : rows.stop - offset]


def split_by_tokens(lengths: Tensor, count: int) -> list[range]:
    """Cut images of `lengths` tokens into consecutive micro-batches of nearly equal tokens, at least one image each.

    The largest exceeds the mean by at most the longest image.
    """
    middles = lengths.cumsum(0) - lengths / 2
    cuts = [0]
    for number in range(1, count):
        cut = int((middles < lengths.sum() * (number / count)).sum())
        cuts.append(min(max(cut, cuts[-1] + 1), len(lengths) - count + number))
    return [range(*ends) for ends in pairwise([*cuts, len(lengths)])]
