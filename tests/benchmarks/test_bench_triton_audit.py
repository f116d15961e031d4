"""The audit of Triton kernels: bytes against the floors, reads that only a cache serves, and useful products."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import cli
from benchmarks.audit import build, triton
from benchmarks.audit.triton import NOT_KEPT, Row, count_all, list_cases, traffic

pytestmark = pytest.mark.exhaustive

ROW = Row(
    op="rope_attention",
    shape="tiny b1",
    dtype="bfloat16",
    direction="forward",
    kernel="forward_kernel",
    programs=8,
    loaded=3_000_000,
    stored=500_000,
    once=1_100_000,
    floor=1_000_000.0,
    again={"k": 5.0, "q, v": 2.5},
    useful=0.94,
)

# The most traffic over the floor. The partial sums of a norm's three programs count. Attention reads q, k, v and the
# output's gradient in two kernels backward: 12 tensors in place of 8. Of the losses' logits, 512 by 512 of 512
# channels, forward keeps 4 bytes and backward reads them and writes the gradients in 2; beside them forward has a pair
# of numbers for each row and each column of a tile of 128.
ROWS, TILES, TWICE = 1.05, 1.1, 1.56
TRAFFIC = {
    ("layer_norm", "forward"): ROWS,
    ("layer_norm", "backward"): ROWS,
    ("add_layer_norm", "forward"): ROWS,
    ("add_layer_norm", "backward"): ROWS,
    ("layer_norm_add", "forward"): ROWS,
    ("layer_norm_add", "backward"): ROWS,
    ("silu_mul", "forward"): 1.0,
    ("silu_mul", "backward"): 1.0,
    ("swiglu", "forward"): ROWS,
    ("swiglu", "backward"): ROWS,
    ("token_dropout", "forward"): ROWS,
    ("token_dropout", "backward"): ROWS,
    ("rope_attention", "forward"): ROWS,
    ("rope_attention", "backward"): TWICE,
    ("causal_attention", "forward"): ROWS,
    ("causal_attention", "backward"): TWICE,
    ("packed_attention", "forward"): ROWS,
    ("packed_attention", "backward"): TWICE,
    ("clip_loss", "forward"): 2.1,
    ("clip_loss", "backward"): 0.8,
    (NOT_KEPT, "forward"): TILES,
    (NOT_KEPT, "backward"): 0.8,
    ("siglip_loss", "forward"): 1.51,
}

# What a kernel loads more than once, by kernel; those of a norm or of SwiGLU only parameters.
PARAMETERS = {"weight", "bias", "prefix", "pos_embed"}
AGAIN = {
    "forward_kernel": PARAMETERS | {"k", "v", "q, k, v", "cos", "sin", "offsets"},
    "backward_kernel": {"weight", "bias"},
    "query_kernel": {"k", "v", "q, k, v", "cos", "sin", "offsets"},
    "key_kernel": {"dout", "q", "q, k, v", "lse", "delta", "cos", "sin", "offsets"},
    "statistics_kernel": {"image", "text", "scale"},
    "merge_kernel": set(),
    "gradient_kernel": {"image", "text", "scale", "drow_lse", "dcol_lse", "dpositive", "row_lse", "col_lse"},
    "siglip_kernel": {"image", "text", "scale", "bias"},
}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed (it exists for Linux only)")
    return count_all(list_cases())


@pytest.mark.slow
@pytest.mark.xdist_group("triton audit")
def test_memory_moves_little_more_than_the_floor(rows: list[Row]) -> None:
    calls: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        calls.setdefault((row.op, row.direction, row.shape), []).append(row)
    assert {(op, direction) for op, direction, _ in calls} == set(TRAFFIC)
    found = {call: traffic(kernels) for call, kernels in calls.items()}
    assert {call: ratio for call, ratio in found.items() if ratio > TRAFFIC[call[:2]]} == {}
    # Less than an activation's share can only mean that something wasn't counted.
    floors = {call: ratio for call, ratio in found.items() if "loss" not in call[0]}
    assert min(floors.values()) >= 0.99


@pytest.mark.slow
@pytest.mark.xdist_group("triton audit")
def test_only_what_a_cache_serves_is_read_again(rows: list[Row]) -> None:
    wrong = [(row.op, row.direction, row.kernel, row.again) for row in rows if not set(row.again) <= AGAIN[row.kernel]]
    assert wrong == []
    (forward,) = (row for row in rows if row.op == "rope_attention" and "l14" in row.shape and "forward" in row.kernel)
    # Four tiles of 64 patches and one of the class token walk over all keys and values.
    assert forward.again["k"] == forward.again["v"] == 5


@pytest.mark.slow
@pytest.mark.xdist_group("triton audit")
def test_a_class_token_in_front_of_256_patches_costs_no_tiles(rows: list[Row]) -> None:
    useful = {
        (row.shape.split("@")[0], row.kernel): row.useful for row in rows if row.op == "rope_attention" and row.useful
    }
    kernels = "forward_kernel", "query_kernel", "key_kernel"
    assert set(useful) == {(model, kernel) for model in ("eva02-l14", "eva01-g14") for kernel in kernels}
    for (model, _), share in useful.items():
        # 88 channels are multiplied as 128.
        assert 0.9 <= share / (88 / 128 if model == "eva01-g14" else 1) <= 1


@pytest.mark.slow
@pytest.mark.xdist_group("triton audit")
def test_losses_make_each_logit_once(rows: list[Row]) -> None:
    useful = {(row.op, row.kernel): row.useful for row in rows if "loss" in row.op and row.kernel != "merge_kernel"}
    assert useful == {
        ("clip_loss", "statistics_kernel"): 1,
        ("clip_loss", "gradient_kernel"): None,
        (NOT_KEPT, "statistics_kernel"): 1,
        (NOT_KEPT, "gradient_kernel"): 1,
        ("siglip_loss", "siglip_kernel"): 1,
    }


def test_the_command_lists_the_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # names are broken in a narrow table
    asked = []
    monkeypatch.setattr(triton, "count_all", lambda cases: asked.extend(cases) or [ROW])
    monkeypatch.setattr(build, "count_all", lambda cases: pytest.fail("no CUDA kernel was asked for"))
    arguments = ["audit", "clip_loss", "--direction", "forward", "--json", str(tmp_path / "audit.json")]
    assert cli.main(arguments) == 0
    assert asked == list_cases(["clip_loss"], directions=["forward"])
    text = capsys.readouterr().out
    for word in ("predicted from counted accesses", "forward_kernel", "1.100", "94 %", "k 5, q v 2.5"):
        assert word in text
    (stored,) = json.loads((tmp_path / "audit.json").read_text())["triton"]
    assert stored["again"] == ROW.again


def test_a_name_of_the_other_language_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", "lamb_step", "--kernels", "triton"]) == 2
    assert "unknown audited operation 'lamb_step'" in capsys.readouterr().err
