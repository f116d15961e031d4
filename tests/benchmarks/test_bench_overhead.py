"""The host's part of a call. What it takes is nobody's promise, so no time is compared."""

import pytest
import torch

from benchmarks import overhead


@pytest.mark.parametrize("name", overhead.PAIRS)
def test_both_of_a_pair_compute_the_same(name: str) -> None:
    pair = overhead.PAIRS[name]
    inputs = overhead._inputs(pair, torch.device("cpu"))
    torch.testing.assert_close(pair.ours(*inputs), pair.torch(*inputs))


def test_the_table_has_each_call_twice(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    found = overhead.measure(torch.device("cpu"), seconds=1e-4)
    assert torch.get_num_threads() == threads
    overhead.show(found, torch.device("cpu"))
    shown = capsys.readouterr().out
    for row in found:
        assert row.ours > 0
        assert f"{row.ratio:.2f}" in shown
    for name in overhead.PAIRS:
        assert f"{name} forward" in shown
        assert f"{name} training" in shown
