"""One optimizer step: features, one loss over the whole batch, exact gradients, a guarded update."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaclip.model.clip import CLIP
from evaclip.train import rng
from evaclip.train.config import Precision
from evaclip.train.distributed import GradientMean, World
from evaclip.train.loss import ContrastiveLoss
from evaclip.train.loss_scale import LossScale
from evaclip.train.sharding import synchronize_gradients
from evaclip.train.token_sampling import token_index
from evaclip.weights import is_sharded
from evakernels import gradient_norm

TOWERS = ("visual", "text")
MAX_LOG_SCALE = math.log(100.0)
_AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


@dataclass(frozen=True)
class StepOptions:
    """How a step is done.

    Attributes:
        accumulation: chunks that each process passes through the model one after the other.
        grad_clip_norm: bound on the L2 norm of all gradients, or None.
        seed: of the token dropout.
        first_row: of the batch of all processes that this one has.
        reduce_each_chunk: gradients of shards are summed over the processes with every chunk, not with the last alone.
    """

    precision: Precision = "fp32"
    accumulation: int = 1
    grad_clip_norm: float | None = None
    seed: int = 0
    first_row: int = 0
    reduce_each_chunk: bool = False


@dataclass(frozen=True)
class StepResult:
    """0-D tensors on the device, so that reading them is the caller's choice.

    Attributes:
        loss: mean over the batch of all processes.
        grad_norm: L2 norm of all gradients before clipping.
        tower_norms: that of each tower's, by name.
        found_inf: 1 if the loss or a gradient was not finite and the update was left out, else 0.
        updates: for each tower `[2]`, the L2 norm of what its weights changed by, and that over the norm of the weights
            themselves; None where it was not asked for.
        accuracy: share of the images whose own text is, of all texts of the batch, the most similar one; None where it
            was not asked for.
    """

    loss: Tensor
    grad_norm: Tensor
    tower_norms: dict[str, Tensor]
    found_inf: Tensor
    updates: dict[str, Tensor] | None = None
    accuracy: Tensor | None = None


@dataclass(frozen=True)
class _Chunk:
    rows: slice
    images: Tensor
    tokens: Tensor
    token_index: Tensor | None


class TrainStep:
    """Trains `model` on one batch per call.

    With `accumulation` > 1 the loss still sees every pair of the batch: features of all chunks are computed without a
    graph, one loss gives the gradient of each feature and of logit_scale, then each chunk is computed again and
    its features' gradients are passed backward. Both passes use the same kept tokens and the same random states, so
    that the result equals that of the whole batch at once.

    A loss or gradient that is not finite makes the optimizer skip its update on the device, through the `found_inf`
    attribute that evakernels' optimizers obey; nothing waits for the device. The loss scale and the bound on the norm
    reach them as one divisor of the gradients, `grad_scale`; the gradients themselves stay as they are.
    """

    def __init__(
        self,
        model: CLIP,
        loss: ContrastiveLoss,
        optimizer: torch.optim.Optimizer,
        options: StepOptions,
        world: World,
    ) -> None:
        self.model = model
        self.loss = loss
        self.optimizer: Any = optimizer
        self.options = options
        self.world = world
        self.parameters: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        towers = {name: list(getattr(model, name).parameters()) for name in TOWERS}
        known = {id(parameter) for parameters in towers.values() for parameter in parameters}
        self._parts = {**towers, "rest": [value for value in self.parameters if id(value) not in known]}
        self._mean = GradientMean([p for name in TOWERS for p in towers[name]], self._parts["rest"], world)
        # Shards are gathered in the 16-bit type, so that there is nothing left to cast.
        self._is_sharded = is_sharded(model)
        self.loss_scale = LossScale(world.device, enabled=options.precision == "amp_fp16")
        self.skipped = torch.zeros((), dtype=torch.int64, device=world.device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=world.device)

    def __call__(self, images: Tensor, tokens: Tensor, step: int, *, measure: bool = False) -> StepResult:
        """
        Args:
            images: [b, 3, height, width] float32, this process's rows of the batch. In host memory they may be larger
                than the device: it gets each chunk when it is that one's turn.
            tokens: [b, context_length] int64.
            step: number of the step from 0; decides which tokens are kept.
            measure: also tell the accuracy and how far the weights moved. The step stays the same, to the bit.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        chunks = list(self._chunks(images, tokens, step))
        loss, *features = self._backward(chunks) if len(chunks) == 1 else self._backward_in_chunks(chunks)
        self._mean.finish()
        loss = self.world.mean_(loss.detach().clone())
        tower_norms = self._tower_norms()
        grad_norm = self._set_divisor(list(tower_norms.values()))
        found_inf, moved = self._update(loss, grad_norm, measure)
        # A tower that isn't trained has no gradients.
        norms = {name: tower_norms.get(name, torch.zeros_like(grad_norm)) for name in TOWERS}
        updates = {name: self._tower_update(name, moved) for name in TOWERS} if measure else None
        accuracy = self.world.mean_(self.loss.accuracy(*features)) if measure else None
        return StepResult(loss, grad_norm, norms, found_inf, updates, accuracy)

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

    def _chunks(self, images: Tensor, tokens: Tensor, step: int) -> Iterator[_Chunk]:
        count = len(images)
        kept = self._kept_tokens(count, step)
        bounds = [number * count // self.options.accumulation for number in range(self.options.accumulation + 1)]
        for rows in map(slice, bounds, bounds[1:]):
            yield _Chunk(rows, images[rows], tokens[rows], None if kept is None else kept[rows])

    def _kept_tokens(self, count: int, step: int) -> Tensor | None:
        visual = self.model.visual
        if not visual.patch_dropout:
            return None
        start = self.options.first_row
        return token_index(
            (self.options.seed, step),
            range(start, start + count),
            visual.num_patches,
            visual.num_kept_patches(),
            self.world.device,
        )

    def _backward(self, chunks: list[_Chunk]) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the features that it is of."""
        image_features, text_features = self._features(chunks[0])
        loss = self._loss(image_features, text_features)
        self._mean.begin()
        (loss * self.loss_scale.scale).backward()
        return loss, image_features.detach(), text_features.detach()

    def _backward_in_chunks(self, chunks: list[_Chunk]) -> tuple[Tensor, Tensor, Tensor]:
        states, features = [], []
        for chunk in chunks:
            states.append(rng.capture(self.world.device))
            with torch.no_grad():
                features.append(self._features(chunk))
        image_features, text_features = (torch.cat(part).requires_grad_() for part in zip(*features, strict=True))
        loss = self._loss(image_features, text_features)
        (loss * self.loss_scale.scale).backward()
        for chunk, state in zip(chunks, states, strict=True):
            is_last = chunk is chunks[-1]
            synchronize_gradients(self.model, is_last or self.options.reduce_each_chunk)
            if is_last:
                self._mean.begin()
            rng.restore(state, self.world.device)
            gradients = [_gradient(features)[chunk.rows] for features in (image_features, text_features)]
            # The features of a locked tower have no graph.
            pairs = zip(self._features(chunk), gradients, strict=True)
            trained = [(features, gradient) for features, gradient in pairs if features.requires_grad]
            if trained:
                torch.autograd.backward([features for features, _ in trained], [gradient for _, gradient in trained])
        return loss, image_features.detach(), text_features.detach()

    def _features(self, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        device = self.world.device
        images, tokens = (part.to(device, non_blocking=True) for part in (chunk.images, chunk.tokens))
        # One autocast region per pass: its cache of cast weights would carry the graph-free casts of the first pass
        # of accumulation over into the second.
        with self._autocast():
            features = self.model(images, tokens, token_index=chunk.token_index)
        return features[0], features[1]

    def _loss(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        scale, bias = self.model.logit_scale, self.model.logit_bias
        loss: Tensor = self.loss(
            _at_least_fp32(image_features),
            _at_least_fp32(text_features),
            _at_least_fp32(scale).exp(),
            None if bias is None else _at_least_fp32(bias),
        )
        return loss

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = None if self._is_sharded else _AUTOCAST.get(self.options.precision)
        return torch.autocast(self.world.device.type, dtype=dtype) if dtype else nullcontext()

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
        divisor = scale
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
        if measure:
            moved = self.optimizer.measured_step()
        else:
            self.optimizer.step()
        self.loss_scale.update(found_inf)
        self.skipped += found_inf.long()
        self.skipped_in_a_row.copy_(torch.where(found_inf > 0, self.skipped_in_a_row + 1, 0))
        self.model.logit_scale.clamp_(0.0, MAX_LOG_SCALE)
        return found_inf, moved


def _gradient(value: Tensor) -> Tensor:
    assert value.grad is not None
    return value.grad


def _at_least_fp32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
