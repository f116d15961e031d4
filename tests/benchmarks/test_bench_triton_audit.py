"""The audit of Triton kernels: bytes against the floors, reads that only a cache serves, and useful products."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest

from benchmarks.audit.build import ARCHS, count_all
from benchmarks.audit.cases import NOT_KEPT, list_cases, operation
from benchmarks.audit.result import REST, Count, Launch
from benchmarks.shapes import parse_shape
from ptx_interpreter.traffic import SECTOR

pytestmark = [pytest.mark.exhaustive, pytest.mark.slow, pytest.mark.xdist_group("triton audit")]

# The most different sectors of each kernel over the floor. The partial sums of a norm's three programs count.
# Attention reads q, k, v and the output's gradient in two kernels backward: 12 tensors in place of 8. Where there is
# a rotation, a kernel reads k and writes it rotated, and the dq kernel writes q rotated: forward has 6 tensors in place
# of 4, backward 15. Of the losses' logits, 512 by 512 of 512 channels, forward keeps 4 bytes and backward reads them
# and writes the gradients in 2; forward also has a pair of numbers for each row and each column of a tile of
# 128. LAMB reads parameters and moments twice: 32 bytes a parameter in bfloat16, where 22 are the floor.
ROWS, TILES, TWICE = 1.05, 1.1, 1.56
FORWARD_AND_BACKWARD = {
    **dict.fromkeys(("layer_norm", "add_layer_norm", "layer_norm_add", "swiglu", "token_dropout"), (ROWS, ROWS)),
    "silu_mul": (1.0, 1.0),
    "rope_attention": (1.6, 1.95),
    "causal_attention": (ROWS, TWICE),
    "packed_attention": (ROWS, TWICE),
    "clip_loss": (2.1, 0.8),
    NOT_KEPT: (TILES, 0.8),
}
FORWARD = {"siglip_loss": 1.51, "lamb_step": 1.46, "adamw_step": 1.01}
TRAFFIC = {(op, "forward"): most for op, most in FORWARD.items()}
TRAFFIC |= {
    (op, direction): most
    for op, both in FORWARD_AND_BACKWARD.items()
    for direction, most in zip(("forward", "backward"), both, strict=True)
}
# The matrix products that a kernel makes, over all tokens or all pairs of features.
PRODUCTS = {"forward_kernel": 2, "dq_kernel": 3, "dkdv_kernel": 4}
PRODUCTS |= dict.fromkeys(("statistics_kernel", "gradient_kernel", "siglip_kernel"), 1)
# What a kernel loads more than once; those of a norm or of SwiGLU only parameters. A row's index, by each warp.
PARAMETERS = {"weight", "bias", "norm_weight", "norm_bias", "prefix", "pos_embed"}
LOSS = {"image", "text", "scale", "bias", "image_features", "text_features", "logit_scale", "logit_bias"}
AGAIN = {
    "rotate_kernel": {"cos", "sin"},
    "forward_kernel": PARAMETERS | {"token_index"} | {"q", "k", "v", "q, k, v", "cos", "sin", "cu_seqlens"},
    "backward_kernel": {"weight", "bias", "norm_weight", "norm_bias"},
    "dq_kernel": {"q", "k", "v", "q, k, v", "cos", "sin", "cu_seqlens"},
    "dkdv_kernel": {"d out 0", "q", "k", "v", "q, k, v", "cos", "sin", "cu_seqlens"},
    "statistics_kernel": LOSS,
    "merge_kernel": set(),
    "gradient_kernel": LOSS,
    "siglip_kernel": LOSS,
    "prepare_kernel": set(),
    "update_kernel": set(),
    "norms_kernel": set(),
    "apply_kernel": set(),
    "squares_kernel": set(),
}


@pytest.fixture(scope="module", params=ARCHS["triton"])
def counts(request: pytest.FixtureRequest) -> list[Count]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed (it exists for Linux only)")
    # Heads of 88 channels are slow, and on 8.0 no others than on 9.0.
    cases = [case for case in list_cases(kernels="triton") if request.param == "sm_90" or "g14" not in case[1]]
    return count_all(cases, request.param, "triton")


def by_kernel(counts: list[Count], chosen: Callable[[Count], bool]) -> list[tuple[Count, Launch]]:
    return [(count, launch) for count in counts if chosen(count) for launch in count.launches]


def useful(count: Count, launches: list[Launch]) -> float | None:
    """Multiplications by formula over the ones of tensor cores."""
    flops = sum(launch.total.flops for launch in launches)
    shape = parse_shape(count.shape)
    product = operation(count.op).work(shape, 1).forward.flops / (2 if "attention" in count.op else 1)
    return PRODUCTS[launches[0].kernel] * product / flops if flops else None


def test_memory_moves_little_more_than_the_floor(counts: list[Count]) -> None:
    assert {(count.op, count.direction) for count in counts} == set(TRAFFIC)
    found = {(count.op, count.direction, count.shape): count.touched for count in counts}
    print(found)
    assert {call: ratio for call, ratio in found.items() if ratio > TRAFFIC[call[:2]]} == {}
    # Less than an activation's share can only mean that something wasn't counted.
    floors = {call: ratio for call, ratio in found.items() if "loss" not in call[0]}
    assert min(floors.values()) >= 0.99


def test_only_what_a_cache_serves_is_read_again(counts: list[Count]) -> None:
    wrong = []
    for count, launch in by_kernel(counts, lambda count: True):
        again = {name for name, own in launch.loads.items() if own.bytes > SECTOR * own.touched and name != REST}
        if not again <= AGAIN[launch.kernel]:
            wrong.append((count.op, count.direction, launch.kernel, again - AGAIN[launch.kernel]))
    assert wrong == []


def test_attention_reads_all_values_for_each_tile(counts: list[Count]) -> None:
    walks = {"sm_80": 5, "sm_90": 3}[counts[0].arch]  # tiles of 64 queries, or of 128, and the class token's
    chosen = by_kernel(counts, lambda count: (count.op, count.direction) == ("rope_attention", "forward"))
    rotate, forward = (launch for count, launch in chosen if "l14" in count.shape)
    assert forward.loads["v"].bytes == pytest.approx(walks * SECTOR * forward.loads["v"].touched, rel=0.02)
    assert rotate.loads["k"].bytes == SECTOR * rotate.loads["k"].touched
    assert "k" not in forward.loads


# On 8.0 several warps make the same products for the class token's tile of 16 rows.
USEFUL = {("sm_80", "dq_kernel"): 0.65, ("sm_80", "dkdv_kernel"): 0.7}


def test_class_token_costs_no_tiles(counts: list[Count]) -> None:
    chosen = by_kernel(counts, lambda count: count.op == "rope_attention" and "l14" in count.shape)
    chosen = [(count, launch) for count, launch in chosen if launch.kernel != "rotate_kernel"]
    assert {launch.kernel for _, launch in chosen} == {"forward_kernel", "dq_kernel", "dkdv_kernel"}
    for count, launch in chosen:
        share = useful(count, [launch])
        assert USEFUL.get((count.arch, launch.kernel), 0.9) <= share <= 1, (count.arch, launch.kernel)


def test_losses_make_each_logit_once(counts: list[Count]) -> None:
    found = {}
    for count in counts:
        kernels = {launch.kernel for launch in count.launches} - {"merge_kernel"} if "loss" in count.op else ()
        for kernel in kernels:
            found[count.op, kernel] = useful(count, [one for one in count.launches if one.kernel == kernel])
    assert found == {
        ("clip_loss", "statistics_kernel"): 1,
        ("clip_loss", "gradient_kernel"): None,
        (NOT_KEPT, "statistics_kernel"): 1,
        (NOT_KEPT, "gradient_kernel"): 1,
        ("siglip_loss", "siglip_kernel"): 1,
    }


def test_attention_writes_its_results_once(counts: list[Count]) -> None:
    for count, launch in by_kernel(counts, lambda count: "attention" in count.op):
        for name, own in launch.stores.items():
            assert own.bytes <= SECTOR * own.touched, (count.op, launch.kernel, name)
