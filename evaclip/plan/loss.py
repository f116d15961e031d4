"""What the contrastive loss of the global batch takes on one GPU."""

from collections import Counter

from evaclip.plan.job import Job
from evaclip.plan.operators import Cost
from evaclip.plan.phases import Bytes, Costs
from evakernels.ops.contrastive import MEMORY_BUDGET

CHUNK_BYTES, MIN_CHUNK = 1 << 28, 2048
"""Of the logits' gradients, as in `evakernels.triton.contrastive`: the rows of one chunk, but never fewer than that."""
LOSS = "loss"
_FLOAT = 4


def loss_bytes(job: Job) -> Bytes:
    """The most that the loss and its gradients take at a time, in backward.

    The texts of all GPUs, their gradient, the copy of it that the reduce-scatter of a list of tensors makes, one chunk
    of the logits' gradients, and the logits where they are few enough to be kept. Nothing where a trace sees the loss.
    """
    if not job.couples:
        return Counter()
    rows, columns, depth = job.local_batch, job.global_batch, job.config.embed_dim
    height = min(rows, max(MIN_CHUNK, CHUNK_BYTES // (_FLOAT * columns)))
    texts = columns * depth * _FLOAT if job.gpus > 1 else 0
    own = 2 * rows * depth * _FLOAT
    statistics = (3 * rows + 4 * columns) * _FLOAT
    logits = (height + rows * _keeps_logits(job)) * columns * _FLOAT
    return Counter({LOSS: 2 * texts + max(texts, own) + logits + statistics})


def loss_costs(job: Job) -> Costs:
    """What the loss computes on one GPU: the logits, twice unless they are kept, and the gradients of both features."""
    if not job.couples:
        return Counter()
    rows, columns, depth = job.local_batch, job.global_batch, job.config.embed_dim
    features, logits = (rows + columns) * depth * _FLOAT, rows * columns * _FLOAT
    product = 2 * rows * columns * depth
    # The tiles of logits that aren't kept stay in registers, but for their gradient.
    first, second = (0, 3) if _keeps_logits(job) else (2, 2)
    costs: Costs = Counter({("loss", Cost("products", False, 32, product, features)): first})
    costs["loss", Cost("products", False, 32, product, features + logits)] += second
    if job.gpus > 1:
        for term in ("gather", "scatter"):
            costs["loss", Cost(f"{term} of texts", False, 0, 0, columns * depth * _FLOAT)] += 1
    return costs


def _keeps_logits(job: Job) -> bool:
    return job.local_batch * job.global_batch * _FLOAT <= MEMORY_BUDGET
