"""How often Triton compiles and launches a kernel.

Widths and alignments need variants of a kernel; numbers of rows, lengths and strides don't.
"""

import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from optimizer_checks import lists

from evakernels.triton import launcher
from evakernels.tuning.calls import Draw, calls

pytest.importorskip("triton")

ROWS = [(1, 1), (1, 197), (2, 16), (3, 257), (16, 64), (17, 5), (64, 1)]
"""Samples and their tokens."""


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


@dataclass(frozen=True)
class Apart(Draw):
    """Rows that begin `more` elements farther apart; tokens of attention have several heads a row."""

    more: int = 0

    def __call__(self, *shape):
        dims = min(len(shape) - 1, 2)
        width = math.prod(shape[dims:])
        return drawn(*shape[:dims], width + self.more)[..., :width].unflatten(-1, shape[dims:])


def model_calls(op, more, **shape):
    """Calls with all optional tensors, for each number of samples, tokens and additional elements a row."""
    width = shape["width"] if "width" in shape else 2 * shape["head_dim"]
    for extra in more:
        for samples, tokens in ROWS[1:]:  # of a single row torch forgets where the next one would begin
            draw = Apart("cpu", torch.bfloat16, samples * tokens * width, samples, heads=2, more=extra)
            sizes = shape | {"tokens": tokens} if "head_dim" in shape else shape
            yield next(calls(op, sizes, draw))


@pytest.mark.parametrize("more", [[0, 8, 16, 24, 768], [0, 1, 2, 3, 4, 5, 6, 8]], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("family", "width"), [("layer_norm", 1024), ("swiglu", 1032)])
def test_rows(variants, family, width, direction, more):
    """One for rows that begin where words of 16 bytes do; three more for those that begin at parts of these."""
    op = f"{family}_{direction}"
    assert variants(op, model_calls(op, more, width=width)) == {f"{direction}_kernel": 4 if 1 in more else 1}


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

    def pairs_of_sizes():
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

    assert variants(op, pairs_of_sizes()) == expected


@pytest.mark.parametrize("more", [[0, 8, 384], [0, 1, 2, 4, 8]], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("family", "shapes"), [("packed_attention", 1), ("rope_attention", 2)])
def test_attention(variants, family, shapes, direction, more):
    """Of a length known to all, whether the prefix stands apart, but for the pass that rotates keys; the alignment of
    rows as for the others."""
    op = f"{family}_{direction}"
    found = variants(op, model_calls(op, more, head_dim=64))
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
