"""Records of a run, and the interface of their sinks."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Record:
    """One logged step.

    Attributes:
        step: optimizer steps so far.
        samples: samples so far, over all processes.
        epoch: `samples` in passes over the data.
        lr: the rate of this step of what belongs to no tower, such as logit_scale.
        grad_norm: L2 norm of all gradients, before clipping.
        loss_scale: what the loss of the next step is multiplied by; 1 but under amp_fp16.
        skipped: steps so far without an update because a number was not finite.
        bad_samples: samples so far that could not be used and were replaced, over all processes.
        samples_per_second: over all processes, since the last record.
        tokens_per_second: the same of tokens that enter the towers' blocks; see `throughput.tokens_computed`.
        data_wait: share of that time spent waiting for data.
        mfu: model FLOP/s over the device's peak.
        memory_gib: peak memory so far, of the GPU's allocator or, without a GPU, of the main process.
        seconds: that the run has taken so far, over all processes that went on with it.
        more: values of the task (`Task.backward`, `Task.measures`) and of each tower, `visual` and, if there is one,
            `text`: lr_TOWER, the rate at its output, 0 if it isn't trained; grad_norm_TOWER; update_norm_TOWER, the L2
            norm of its update in this step; update_ratio_TOWER, its ratio to the norm of the weights.
    """

    step: int
    samples: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    loss_scale: float
    skipped: int
    bad_samples: int
    samples_per_second: float
    tokens_per_second: float
    data_wait: float
    mfu: float
    memory_gib: float
    seconds: float
    more: Mapping[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """All numbers by name, as logs have them."""
        return {name: value for name, value in vars(self).items() if name != "more"} | dict(self.more)


class Sink:
    """A destination of records and messages. Unimplemented hooks are no-ops."""

    def record(self, record: Record) -> None:
        """One logged step."""

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """What was measured after `step` steps."""

    def say(self, message: str) -> None:
        """A line for those who watch."""

    def close(self, error: BaseException | None = None) -> None:
        """`error` is what ended the run, if anything did."""


def is_share(metric: str) -> bool:
    """Whether this metric of an evaluation is in [0, 1]."""
    return metric.rpartition("/")[2] not in ("loss", "seconds")
