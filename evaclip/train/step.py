"""One optimizer step of any task: loss and gradients, their mean over ranks, a guarded update."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaclip.data.loader import Rows, part_of_batch
from evaclip.train.config import Precision
from evaclip.train.distributed import GradientMean, World, accumulate_in_float32
from evaclip.train.loss_scale import LossScale
from evaclip.train.micro_batch import MicroBatch, StepContext, Upload
from evaclip.train.sharding import synchronize_gradients
from evaclip.train.tasks.task import Task
from evaclip.train.token_sampling import token_index
from evaclip.transforms import Normalization
from evaclip.weights import is_sharded
from evakernels import gradient_norm

_AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


@dataclass(frozen=True)
class StepOptions:
    """Options of one optimizer step.

    Attributes:
        accumulation: micro-batches per step and rank.
        grad_clip_norm: maximum global L2 norm of the gradients; None disables clipping.
        seed: seed of token dropout.
        first_row: index of this rank's first row in the global batch.
        batch_size: global batch size; None if all ranks have equal local batches.
        together: number of consecutive rows that stay in one micro-batch.
        reduce_each_micro_batch: reduce-scatter after every micro-batch instead of only the last.
    """

    precision: Precision = "fp32"
    accumulation: int = 1
    grad_clip_norm: float | None = None
    seed: int = 0
    first_row: int = 0
    batch_size: int | None = None
    together: int = 1
    reduce_each_micro_batch: bool = False


@dataclass(frozen=True)
class StepResult:
    """0-D tensors on the device, so that reading them is the caller's choice.

    Attributes:
        loss: mean over the batch of all processes.
        grad_norm: L2 norm of all gradients before clipping.
        tower_norms: L2 norm of each tower's gradients, by name.
        found_inf: 1 if the loss or a gradient was not finite and the update was left out, else 0.
        updates: for each tower `[2]`, the L2 norm of what its weights changed by, and that over the norm of the weights
            themselves; None where it was not asked for.
        measures: the task's other metrics of the batch and the model, by the names in the log; None
            where it was not asked for.
    """

    loss: Tensor
    grad_norm: Tensor
    tower_norms: dict[str, Tensor]
    found_inf: Tensor
    updates: dict[str, Tensor] | None = None
    measures: dict[str, Tensor] | None = None

    def named(self) -> dict[str, Tensor]:
        """What was asked for, and the towers' norms, by the names in the log."""
        found = {f"grad_norm_{tower}": norm for tower, norm in self.tower_norms.items()}
        for tower, values in (self.updates or {}).items():
            found[f"update_norm_{tower}"], found[f"update_ratio_{tower}"] = values.unbind()
        return {**(self.measures or {}), **found}


class TrainStep:
    """Trains a task's model on one batch per call.

    A loss or gradient that is not finite makes the optimizer skip its update on the device, through the `found_inf`
    attribute that evakernels' optimizers obey; nothing waits for the device. The loss scale and the bound on the norm
    reach them as one divisor of the gradients, `grad_scale`; the gradients themselves stay as they are.
    """

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer, options: StepOptions, world: World) -> None:
        self.task = task
        self.optimizer: Any = optimizer
        self.options = options
        self.world = world
        self.parameters: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        towers: dict[str, list[Tensor]] = {name: list(tower.parameters()) for name, tower in task.towers.items()}
        known = {id(parameter) for parameters in towers.values() for parameter in parameters}
        self._parts = {**towers, "rest": [value for value in self.parameters if id(value) not in known]}
        if options.accumulation > 1:
            accumulate_in_float32(self.parameters, reduce_each_micro_batch=options.reduce_each_micro_batch)
        self.mean = GradientMean([p for tower in towers.values() for p in tower], self._parts["rest"], world)
        # Shards are gathered in the 16-bit type, so that there is nothing left to cast.
        self.autocast_dtype = None if is_sharded(task.model) else _AUTOCAST.get(options.precision)
        self.normalize = Normalization(task.preprocess, world.device)
        self.copies = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        # Called before weights, moments and counters change.
        self.before_update: Callable[[], None] = lambda: None
        self.loss_scale = LossScale(world.device, enabled=options.precision == "amp_fp16")
        self.skipped = torch.zeros((), dtype=torch.int64, device=world.device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=world.device)

    def __call__(self, images: Tensor | Rows, targets: Tensor, step: int, *, measure: bool = False) -> StepResult:
        """
        Args:
            images: [b, 3, height, width], this process's rows of the batch: float32, or uint8 to be normalised as the
                model says. In host memory they may be larger than the device: each micro-batch is copied while the one
                before is computed, and the host doesn't wait if they are pinned.
            targets: [b, ...], targets of the task, in host memory: otherwise the host waits for the device.
            step: number of the step from 0; decides which tokens are kept.
            measure: also tell what the task measures and how far the weights moved. The step stays the same, to the
                bit.
        """
        self.task.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        found = self.task.backward(self._context(images, targets, step, measure))
        self.mean.finish()
        loss = self.world.mean_(found.pop("loss").detach().clone())
        tower_norms = self._tower_norms()
        grad_norm = self._set_divisor(list(tower_norms.values()))
        found_inf, moved = self._update(loss, grad_norm, measure)
        # A tower that isn't trained has no gradients.
        norms = {name: tower_norms.get(name, torch.zeros_like(grad_norm)) for name in self.task.towers}
        if not measure:
            return StepResult(loss, grad_norm, norms, found_inf)
        updates = {name: self._tower_update(name, moved) for name in self.task.towers}
        measures = {name: self.world.mean_(value) for name, value in found.items()} | self.task.measures()
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

    def _context(self, images: Tensor | Rows, targets: Tensor, step: int, measure: bool) -> StepContext:
        options, count = self.options, len(targets)
        kept = self._kept_tokens(count, step)
        parts = [part_of_batch(count, i, options.accumulation, options.together) for i in range(options.accumulation)]
        micro_batches = [
            MicroBatch(rows, targets[rows], None if kept is None else kept[rows], step, options.first_row + rows.start)
            for rows in (slice(part.start, part.stop) for part in parts)
        ]
        return StepContext(
            micro_batches,
            images,
            device=self.world.device,
            step=step,
            measure=measure,
            upload=self._upload,
            autocast_dtype=self.autocast_dtype,
            loss_scale=self.loss_scale.scale,
            share=self.world.size / (options.batch_size or count * self.world.size),
            begin_backward=self._begin_backward,
        )

    def _upload(self, images: Iterable[Tensor | Rows]) -> Upload:
        return Upload(images, self.world.device, self.copies, self.normalize)

    def _begin_backward(self, is_last: bool) -> None:
        synchronize_gradients(self.task.towers.values(), is_last or self.options.reduce_each_micro_batch)
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
        """Norms of the gradients of each tower, and of what belongs to none."""
        return {
            name: gradient_norm(gradients).to(self.world.device) / self.loss_scale.scale
            for name, parameters in self._parts.items()
            if (gradients := [p.grad for p in parameters if p.grad is not None])
        }

    @torch.no_grad()
    def _set_divisor(self, norms: list[Tensor]) -> Tensor:
        scale = self.loss_scale.scale
        grad_norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        divisor: Tensor | None = scale if self.loss_scale.enabled else None
        if self.options.grad_clip_norm is not None:
            divisor = scale * (grad_norm / self.options.grad_clip_norm).clamp(min=1.0)
        self.optimizer.grad_scale = divisor
        return grad_norm

    @torch.no_grad()
    def _tower_update(self, name: str, moved: dict[Tensor, Tensor]) -> Tensor:
        squares = [moved[parameter] for parameter in self._parts[name] if parameter in moved]
        if not squares:
            return torch.zeros(2, device=self.world.device)
        weights, change = torch.stack(squares).sum(0).sqrt().unbind()
        return torch.stack([change, change / weights]).to(self.world.device)

    @torch.no_grad()
    def _update(self, loss: Tensor, grad_norm: Tensor, measure: bool) -> tuple[Tensor, dict[Tensor, Tensor]]:
        found_inf = (~(loss.isfinite() & grad_norm.isfinite())).float()
        self.optimizer.found_inf = found_inf
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
