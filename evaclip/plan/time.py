"""How long a step takes, as a range: each kernel by the roofline, communication by its bytes."""

from dataclasses import dataclass

from evaclip.plan.gpus import PER_NODE, Gpu
from evaclip.plan.job import Job
from evaclip.plan.loss import loss_costs
from evaclip.plan.memory import Memory
from evaclip.plan.operators import Cost
from evaclip.plan.phases import TEACHER, Costs

COMMUNICATION = ("gather", "scatter", "reduce", "gather of texts", "scatter of texts")


@dataclass(frozen=True)
class Assumptions:
    """Shares of the data sheet's rates that are reached; (slow, fast). No measurement on a GPU stands behind them."""

    products: tuple[float, float] = (0.50, 0.75)
    attention: tuple[float, float] = (0.25, 0.50)
    memory: tuple[float, float] = (0.60, 0.85)
    links: tuple[float, float] = (0.60, 0.90)
    overlap: tuple[float, float] = (0.0, 1.0)
    """How much of the communication goes on beside computation."""
    host_link_gbps: tuple[float, float] = (12.0, 45.0)
    """Between a GPU and host memory, in one direction: PCIe 4 that is shared to PCIe 5."""
    host_memory_gbps: tuple[float, float] = (15.0, 50.0)
    """Of the host, for the optimizer of one GPU: a node's share of one in eight."""


ASSUMPTIONS = Assumptions()


@dataclass(frozen=True)
class Time:
    """Of one step on one GPU; ranges are (slow, fast), in seconds.

    Attributes:
        terms: of `forward`, `backward`, `recomputation`, `loss`, `optimizer` and `communication`, where there is one of
            `teacher`, and under offload of `host link`, which is communication too.
        step: the whole.
        flops: floating-point operations by stage and term.
        model_flops: those that the model is known by, forward and backward, nothing left out but dropped patches.
    """

    terms: dict[str, tuple[float, float]]
    step: tuple[float, float]
    flops: dict[str, dict[str, int]]
    model_flops: int

    def gpu_hours(self, job: Job) -> tuple[float, float]:
        """Of all samples of the job."""
        assert job.samples is not None
        steps = job.samples / job.global_batch
        slow, fast = (seconds * steps * job.gpus / 3600 for seconds in self.step)
        return slow, fast

    def utilization(self, job: Job, gpu: Gpu) -> tuple[float, float]:
        """MFU: what share of the GPU's peak the model's own operations are."""
        rate = 1e12 * (gpu.single_tflops if job.precision == "fp32" else gpu.half_tflops)
        slow, fast = (self.model_flops / seconds / rate for seconds in self.step)
        return slow, fast


def plan_time(job: Job, memory: Memory, gpu: Gpu, assumptions: Assumptions = ASSUMPTIONS) -> Time:
    """The time of a step, from what its trace has computed and moved."""
    costs = memory.steps.costs(job.accumulation, again=job.couples)
    costs += loss_costs(job) + _optimizer(job, memory) + _mean(job, memory)
    both = [_terms(job, gpu, costs, assumptions, place) for place in (0, 1)]
    if job.offload != "none":
        for place, slow_or_fast in enumerate(both):
            _on_the_host(slow_or_fast, job, memory, assumptions, place)
    terms = {name: (both[0][name], both[1][name]) for name in both[0]}
    steps = [_whole(both[place], assumptions.overlap[place]) for place in (0, 1)]
    return Time(terms, (steps[0], steps[1]), _flops(costs), int(job.local_batch * memory.flops_per_sample))


def seconds_of(cost: Cost, gpu: Gpu, assumptions: Assumptions, place: int) -> float:
    """Of one call: as long as the slower of its operations and its bytes takes."""
    moving = cost.bytes / (1e9 * gpu.memory_gbps * assumptions.memory[place])
    if not cost.flops:
        return moving
    rate = 1e12 * (gpu.single_tflops if cost.bits > 16 else gpu.half_tflops)
    share = assumptions.attention if cost.term == "attention" else assumptions.products
    return max(moving, cost.flops / (rate * share[place]))


def seconds_of_collective(cost: Cost, job: Job, gpu: Gpu, assumptions: Assumptions, place: int) -> float:
    """Of a ring: each GPU sends all but its own part once, in an all-reduce twice."""
    copies, everybody = job.gpus // job.shards, cost.term.endswith("of texts") or job.mode == "replicate"
    size = job.gpus if everybody else copies if cost.term == "reduce" else job.shards
    if size == 1:
        return 0.0
    # Groups that hold one GPU of each node share its network; a group of whole nodes has it for itself.
    in_a_node = PER_NODE if not everybody and cost.term == "reduce" and job.shards >= PER_NODE else 1
    spans_nodes = size * in_a_node > PER_NODE
    rate = min(gpu.node_gbps, gpu.network_gbps[place] / in_a_node) if spans_nodes else gpu.node_gbps
    turns = 2 if cost.term == "reduce" else 1
    return turns * cost.bytes * (size - 1) / size / (1e9 * rate * assumptions.links[place])


def _terms(job: Job, gpu: Gpu, costs: Costs, assumptions: Assumptions, place: int) -> dict[str, float]:
    stages = (TEACHER, "forward", "backward", "recomputation", "loss", "optimizer", "communication")
    terms = dict.fromkeys(stages, 0.0)
    for (stage, cost), calls in costs.items():
        if cost.term in COMMUNICATION:
            terms["communication"] += calls * seconds_of_collective(cost, job, gpu, assumptions, place)
        else:
            terms[stage] += calls * seconds_of(cost, gpu, assumptions, place)
    return {stage: seconds for stage, seconds in terms.items() if seconds or stage != TEACHER}


def _on_the_host(terms: dict[str, float], job: Job, memory: Memory, assumptions: Assumptions, place: int) -> None:
    """Under offload the optimizer is as fast as host memory; shards go to the GPU, gradients come back."""
    moved, gathered = _optimizer_bytes(job) * memory.parameters, job.weight_bytes * memory.parameters
    terms["optimizer"] = moved / (1e9 * assumptions.host_memory_gbps[place])
    passes = (2 + (job.couples and job.accumulation > 1)) * job.accumulation if job.reshard else 1
    terms["host link"] = (passes + 1) * gathered / (1e9 * assumptions.host_link_gbps[place])


def _whole(terms: dict[str, float], overlap: float) -> float:
    """What communication there is beside the towers' work costs nothing, as far as it overlaps."""
    beside = sum(terms.get(stage, 0.0) for stage in (TEACHER, "forward", "backward", "recomputation"))
    hidden = overlap * min(beside, terms["communication"] + terms.get("host link", 0.0))
    return sum(terms.values()) - hidden


def _flops(costs: Costs) -> dict[str, dict[str, int]]:
    flops: dict[str, dict[str, int]] = {}
    for (stage, cost), calls in costs.items():
        if cost.flops:
            of_stage = flops.setdefault(stage, {})
            of_stage[cost.term] = of_stage.get(cost.term, 0) + calls * cost.flops
    return flops


def _optimizer(job: Job, memory: Memory) -> Costs:
    return Costs({("optimizer", Cost("elementwise", False, 32, 0, _optimizer_bytes(job) * memory.parameters)): 1})


def _optimizer_bytes(job: Job) -> int:
    """Of a parameter: AdamW reads four tensors and writes three; LAMB reads three of them again for the step itself."""
    moved = 2 * job.weight_bytes + job.gradient_bytes + 2 * job.state_bytes
    return moved + job.weight_bytes + job.state_bytes if job.optimizer == "lamb" else moved


def _mean(job: Job, memory: Memory) -> Costs:
    """Under replication the trainer itself takes the mean of the gradients, in float32."""
    if job.mode != "replicate" or job.gpus == 1:
        return Costs()
    return Costs({("backward", Cost("reduce", False, 0, 0, 4 * memory.parameters)): 1})
