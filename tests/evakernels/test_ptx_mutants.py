"""The driver program notices every changed instruction of nvcc's kernels, but for tests/cuda/survivors.json."""

from collections.abc import Callable
from pathlib import Path

import pytest
from planted_faults import SOURCES, files_of_tags
from ptx_build import BUILD, budget, gxx
from ptx_mutants import SMALL, listed, outcomes_of, table, unexpected


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(gxx() is None or budget.nvcc() is None, reason="no g++ or nvcc")
def test_mutants_are_noticed_or_listed(made_once: Callable[..., Path]) -> None:
    made_once("ptx", lambda folder: budget.build("ptx"))
    outcomes = outcomes_of(BUILD / "ptx/drive.so", SMALL)
    print(table(outcomes), *(outcome for outcome in outcomes if not outcome.noticed), sep="\n")
    assert unexpected(outcomes) == []
    assert {outcome.kind for outcome in outcomes} == SMALL.keys()


def test_listed_places_exist() -> None:
    places = files_of_tags().keys() | {path.name for path in SOURCES.iterdir()}
    assert {place for rows in listed().values() for _, _, place, _ in rows} <= places
