"""Every public function's docstring has an example, and what it prints is what stands there."""

import doctest

import pytest
import torch

import evakernels


@pytest.mark.parametrize("name", [*evakernels.ops.__all__, "checkpoint_policy", "clip_grad_norm_"])
def test_the_example_is_right(name):
    names = {"torch": torch, "evakernels": evakernels}
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(evakernels, name), name, globs=names)
    assert test.examples
    report: list[str] = []
    assert not doctest.DocTestRunner().run(test, out=report.append).failed, "".join(report)
