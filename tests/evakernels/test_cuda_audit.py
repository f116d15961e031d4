"""What nvcc's kernels ask of memory, counted in their PTX: each byte once, whole words, no bank twice."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ptx_build import BUILD, budget

from benchmarks.audit.build import count_all
from benchmarks.audit.result import Count

FORWARD, BACKWARD = 1.05, 1.10
WIDEST = 512  # bytes of a warp's request
WHOLE, PARTLY = (WIDEST, WIDEST), (400, 400)

# The most traffic over the floor, and the fewest bytes a load and store. Forward passes have some fifty rows; backward
# ones as many as keep the partial sums of three blocks, which count too, small.
EXPECTED = {
    ("layer_norm", "eva02-l14@112 b1", "forward"): (FORWARD, WHOLE),
    # 176 vectors a row: half of a warp has nothing to do in the last step.
    ("layer_norm", "eva01-g14@112 b1", "forward"): (FORWARD, PARTLY),
    ("layer_norm", "eva02-b16@224 b1", "backward"): (BACKWARD, WHOLE),
    ("add_layer_norm scaled", "eva02-b16@112 b1", "forward"): (FORWARD, WHOLE),
    ("add_layer_norm scaled", "eva02-b16@224 b1", "backward"): (BACKWARD, WHOLE),
    ("layer_norm_add scaled", "eva02-b16@112 b1", "forward"): (FORWARD, WHOLE),
    ("layer_norm_add scaled", "eva02-b16@224 b1", "backward"): (BACKWARD, WHOLE),
    # Rows of 5,460 bytes begin anywhere in a sector: of the words that neighbours share, each takes its own part.
    ("layer_norm of hidden", "eva02-l14@112 b1", "forward"): (FORWARD, PARTLY),
    ("layer_norm of hidden", "eva02-l14@224 b1", "backward"): (BACKWARD, PARTLY),
    ("add_layer_norm scaled of hidden", "eva02-l14@112 b1", "forward"): (FORWARD, PARTLY),
    ("add_layer_norm scaled of hidden", "eva02-l14@224 b1", "backward"): (BACKWARD, PARTLY),
    ("layer_norm_add scaled of hidden", "eva02-l14@112 b1", "forward"): (FORWARD, PARTLY),
    ("layer_norm_add scaled of hidden", "eva02-l14@224 b1", "backward"): (BACKWARD, PARTLY),
    ("silu_mul", "eva02-b16@64 b1", "forward"): (FORWARD, WHOLE),
    ("silu_mul", "eva02-b16@64 b1", "backward"): (BACKWARD, WHOLE),
    ("swiglu", "eva02-b16@112 b1", "forward"): (FORWARD, WHOLE),
    ("swiglu", "eva02-b16@224 b1", "backward"): (BACKWARD, WHOLE),
    ("swiglu", "eva02-l14@112 b1", "forward"): (FORWARD, PARTLY),
    ("swiglu", "eva02-l14@224 b1", "backward"): (BACKWARD, PARTLY),
    ("token_dropout", "eva02-b16@112 b8 drop50", "forward"): (FORWARD, WHOLE),
    ("token_dropout", "eva02-b16@112 b8 drop50", "backward"): (BACKWARD, WHOLE),
    # Of the patches of a channel, side by side, half are kept: each sector has some of both.
    ("token_dropout by channel", "eva02-b16@224 b8 drop50", "forward"): (1.70, (48, 128)),
    ("gelu", "eva02-b16:text b1", "forward"): (FORWARD, WHOLE),
    ("gelu", "eva02-b16:text b1", "backward"): (BACKWARD, WHOLE),
    # A prefix token alone has a tile of 16 slots, and 50 patches fill four in part. Backward reads dout twice.
    ("rope_attention", "eva02-b16@112 b1", "forward"): (FORWARD, (450, 450)),
    ("rope_attention", "eva02-b16@112 b1", "backward"): (1.20, (450, 450)),
    # Heads of 88 and 112 channels have 11 and 14 vectors a row, which 16 lanes share, and those of 88 begin and end in
    # the middle of a sector.
    ("rope_attention", "eva01-g14@112 b1", "forward"): (1.16, (340, 340)),
    ("rope_attention", "eva01-g14@112 b1", "backward"): (1.30, (340, 340)),
    ("rope_attention", "eva02-bige14@112 b1", "forward"): (FORWARD, (435, 435)),
    ("rope_attention", "eva02-bige14@112 b1", "backward"): (1.20, (435, 435)),
    ("causal_attention", "eva02-b16:text b1", "forward"): (FORWARD, (490, 490)),
    # Two passes: the norms must be known before the step. Parameter and gradient have 8 bytes a lane.
    ("lamb_step", "tiny@32 b1", "forward"): (1.50, (380, 380)),
}
# The most that different sectors come to, over the floor, where requests find in a cache what others have left.
TOUCHED = {
    ("rope_attention", "eva02-b16@112 b1", "backward"): BACKWARD,
    ("rope_attention", "eva01-g14@112 b1", "forward"): FORWARD,
    ("rope_attention", "eva01-g14@112 b1", "backward"): BACKWARD,
    ("rope_attention", "eva02-bige14@112 b1", "backward"): BACKWARD,
}
# And the bytes of different sectors that a step moves for a parameter, all in float32. LAMB's second kernel reads again
# what the first one has left in the cache: 12 of these bytes.
BYTES_A_PARAMETER = {"lamb_step": 40.5, "lamb_step of a large tensor": 40.5}
CASES = [(op, shape, "bfloat16", direction) for op, shape, direction in EXPECTED]
STEPS = [(op, "tiny@32 b1", "float32", "forward") for op in BYTES_A_PARAMETER]
# 9.0 gets the PTX for 8.0, and attention more shared memory. On 10.0 one kernel of odd rows stands for all.
ATTENTION = [case for case in CASES if "attention" in case[0]]
FEWER = [case for case in CASES if " of hidden" not in case[0]]
ASKED = {"sm_80": CASES + STEPS, "sm_90": ATTENTION, "sm_100": FEWER}

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.slow,
    pytest.mark.skipif(budget.nvcc() is None, reason="no nvcc"),
    pytest.mark.xdist_group("cuda audit"),
]


@pytest.fixture(scope="module", params=ASKED)
def counts(request: pytest.FixtureRequest, made_once: Callable[..., Path]) -> list[Count]:
    made_once("ptx", lambda folder: budget.build("ptx"))
    return count_all(ASKED[request.param], request.param, library=BUILD / "ptx/_ops.so")


def test_memory_traffic_is_minimal(counts: list[Count]) -> None:
    wrong = []
    for count in counts:
        case = count.op, count.shape, count.direction
        if count.dtype != "bfloat16":
            continue
        traffic, (load, store) = EXPECTED[case]
        facts = count.traffic, count.touched, count.bytes_a_load, count.bytes_a_store, count.worst_ways
        print(*case, *facts)
        # Less than the floor can only mean that something wasn't counted; token dropout's floor has all positions.
        if not 0.97 <= count.traffic <= traffic or count.touched > 1.5:
            wrong.append((*case, "traffic", *facts))
        if count.bytes_a_load < load or count.bytes_a_store < store:
            wrong.append((*case, "bytes a request", *facts))
        if count.worst_ways > 2:
            wrong.append((*case, "bank conflicts", *facts))
        if count.touched > TOUCHED.get(case, traffic):
            wrong.append((*case, "different sectors", *facts))
    assert wrong == []


def test_optimizer_traffic_per_parameter(counts: list[Count]) -> None:
    steps = [count for count in counts if count.op in BYTES_A_PARAMETER and count.dtype == "float32"]
    if counts[0].arch != "sm_80":
        pytest.skip("counted on 8.0")
    found = {count.op: count.touched * count.floor / (count.sizes["grads"] / 4) for count in steps}
    print(found)
    assert all(found[op] <= most for op, most in BYTES_A_PARAMETER.items()), found
    # Less than that can only mean that something wasn't counted.
    assert all(bytes_ >= 28 for bytes_ in found.values()), found
