"""Nothing in nvcc's kernels is there for no reason: with one instruction changed the driver program notices.

What it doesn't notice is in tests/cuda/survivors.json, with the reason.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from op_suite import ROOT
from ptx_build import BUILD, budget, gxx
from ptx_mutants import SMALL, compared, listed, outcomes_of, table


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(gxx() is None or budget.nvcc() is None, reason="no g++ or nvcc")
def test_every_mutant_is_noticed_or_explained(made_once: Callable[..., Path]) -> None:
    made_once("ptx", lambda folder: budget.build("ptx"))
    outcomes = outcomes_of(BUILD / "ptx/drive.so", SMALL)
    print(table(outcomes))
    unexplained, outdated = compared(outcomes)
    assert not unexplained
    assert not outdated
    assert {outcome.kind for outcome in outcomes} == SMALL.keys()


def test_the_list_names_lines_that_there_are_and_reasons() -> None:
    for outcome, reason in listed().items():
        assert reason, outcome
        source = " ".join(outcome.source.split())
        assert source in " ".join((ROOT / "csrc/cuda" / outcome.file).read_text().split()), outcome
