"""How often Triton compiles and launches a kernel.

Widths and alignments need variants of a kernel; numbers of rows, lengths and strides don't.
"""

from collections import Counter

import pytest
import torch
from optimizer_checks import lists

from evakernels.triton import launcher

pytest.importorskip("triton")

ROWS = [(1, 1), (1, 197), (2, 16), (3, 257), (16, 64), (17, 5), (64, 1)]
"""Samples and their tokens."""
EPS = 1e-6


@pytest.fixture
def launches(monkeypatch):
    """Each launch: the kernel and its variant. None is compiled or run."""
    from triton import knobs
    from triton.runtime.driver import driver
    from triton_compile import AbsentGPU

    found = []
    monkeypatch.setattr(driver, "_active", AbsentGPU(90))
    note = lambda *, fn, key, **_: found.append((fn.name.rpartition(".")[2], key)) or True  # noqa: E731
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    return found


@pytest.fixture
def variants(launches):
    """`variants(op, calls)`: by kernel, how many variants the launches need."""

    def count(op, calls):
        for arguments in calls:
            launcher(op)(*arguments)
        return dict(Counter(name for name, _ in set(launches)))

    return count


def drawn(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


def statistic(*shape):
    return drawn(*shape, dtype=torch.float32)


def rows_apart(samples, tokens, width, more):
    """Rows of `width`, which begin `width + more` elements apart."""
    return drawn(samples, tokens, width + more)[..., :width]


def norm(backward, more):
    vectors = drawn(3, 768).unbind()
    for samples, tokens in ROWS:
        x, scale, statistics = rows_apart(samples, tokens, 768, more), drawn(samples), statistic(2, samples, tokens)
        if backward:
            yield x, x, vectors[0], statistics, [True] * 4, None, vectors[2], scale, x, x
        else:
            yield x, *vectors[:2], EPS, False, None, x, vectors[2], scale, True


def swiglu(backward, more):
    weight = drawn(682)
    for samples, tokens in ROWS[1:]:  # of a single row torch forgets where the next one would begin
        gate, up = (rows_apart(samples, tokens, 682, 6 + more) for _ in range(2))
        of_row = statistic(samples, tokens)
        yield (gate, gate, up, weight, of_row, of_row, [True] * 2) if backward else (gate, up, weight, weight, EPS)


FAMILIES = {"layer_norm": norm, "swiglu": swiglu}


@pytest.mark.parametrize("more", [[0, 8, 16, 24, 768], [0, 1, 2, 3, 4, 5, 6, 8]], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows(variants, family, direction, more):
    """One for rows that begin where words of 16 bytes do; three more for those that begin at parts of these."""
    calls = [call for one in more for call in FAMILIES[family](direction == "backward", one)]
    assert variants(f"{family}_{direction}", calls) == {f"{direction}_kernel": 4 if 1 in more else 1}


BATCHES = [(1, 1), (2, 2), (5, 7), (16, 16), (48, 144), (67, 67), (130, 260), (192, 192), (200, 1000)]
"""Images and texts."""


def pairs(depth):
    for images, texts in BATCHES:
        yield drawn(images, depth), drawn(texts, depth), statistic(), statistic()


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("contrastive_forward", {"statistics_kernel": 3, "merge_kernel": 2}),
        ("contrastive_backward", {"gradient_kernel": 3}),
        ("siglip_forward", {"siglip_kernel": 3}),
    ],
)
def test_losses(variants, op, expected):
    """One for one text, one where 16 divides the number of texts, and one for the others."""

    def calls():
        for offset in (0, 3):
            for image, text, scale, bias in (*pairs(512), *pairs(64)):
                rows, columns = statistic(len(image)), statistic(len(text))
                if op == "siglip_forward":
                    yield image, text, scale, bias, offset, [True] * 4
                elif op == "contrastive_forward":
                    yield image, text, scale, offset, True
                else:
                    logits = statistic(len(image), len(text))
                    yield rows, columns, rows, image, text, scale, rows, columns, logits, offset, [True, True]

    assert variants(op, calls()) == expected


def heads(samples, tokens, more):
    shape = samples, tokens, 3, 2, 64
    return rows_apart(samples, tokens, 3 * 2 * 64, more).view(shape).unbind(2)


def rotary(backward, more):
    for samples, tokens in ROWS[1:]:
        q, k, v = heads(samples, tokens, more)
        tables = (drawn(tokens - 1, 32) for _ in range(2))
        rest = *tables, None, 1, False, True, 0.125
        lse = statistic(samples, 2, tokens)
        yield (q, q, k, v, q, lse, *rest) if backward else (q, k, v, *rest)


def packed(backward, more):
    for samples, tokens in ROWS[1:]:
        q, k, v = (x.flatten(0, 1) for x in heads(samples, tokens, more))
        tables = (drawn(tokens, 32) for _ in range(2))
        rest = torch.arange(0, samples * tokens + 1, tokens), *tables, None, tokens, True, True, 0.125
        yield (q, q, k, v, q, statistic(2, len(q)), *rest) if backward else (q, k, v, *rest)


@pytest.mark.parametrize("more", [[0, 8, 384], [0, 1, 2, 4, 8]], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("family", "shapes"), [("packed_attention", 1), ("rope_attention", 2)])
def test_attention(variants, family, shapes, direction, more):
    """Of a length known to all, whether the prefix stands apart, but for the pass that rotates keys; the alignment of
    rows as for the others."""
    calls = rotary if family == "rope_attention" else packed
    found = variants(f"{family}_{direction}", [call for one in more for call in calls(direction == "backward", one)])
    passes = 1 if direction == "forward" else 2  # of one kernel
    assert set(found) == {"attention_kernel"}
    assert found["attention_kernel"] <= (1 + passes * shapes) * (4 if 1 in more else 1), found


# --- optimizers -------------------------------------------------------------------------------------------------------

FLOAT, BETAS_AND_EPS = torch.float32, (0.9, 0.98, 1e-6)


def step_adamw(state):
    count = len(state[0])
    launcher("adamw_update")(*state, [0.1] * count, [0.0] * count, BETAS_AND_EPS, None, None, [], [])


def test_optimizer_step_launches_once_per_phase(launches):
    state = lists(sizes=[16 * (1 + i % 7) for i in range(300)])
    step_adamw(state)
    assert [name for name, _ in launches] == ["prepare_kernel", "update_kernel"]
    launches.clear()
    numbers = [0.1] * 300
    norms = launcher("lamb_update")(*state, numbers, BETAS_AND_EPS, True, None, None)
    launcher("lamb_apply")(state[0], *state[2:], norms, numbers, numbers, BETAS_AND_EPS, True, None, [], [])
    update, apply = ["prepare_kernel", "update_kernel", "norms_kernel"], ["prepare_kernel", "apply_kernel"]
    assert [name for name, _ in launches] == update + apply


def test_dtypes_and_alignments_split_launches(launches):
    mixed = [lists((dtype, dtype, FLOAT, FLOAT), [32, 33, 64]) for dtype in (FLOAT, torch.bfloat16, torch.float16)]
    step_adamw([[t for part in parts for t in part] for parts in zip(*mixed, strict=True)])
    assert Counter(name for name, _ in launches) == {"prepare_kernel": 1, "update_kernel": 6}
