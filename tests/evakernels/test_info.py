"""`info()` on this machine (tests/packaging: without the native library), and the examples in docstrings."""

import doctest
import json
import platform

import pytest
import torch

import evaclip
import evakernels
from evakernels import _native
from evakernels._info import info


def test_info_is_plain_and_true() -> None:
    found = info()
    assert json.loads(json.dumps(found)) == found
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["evakernels"] == evakernels.__version__ == evaclip.__version__
    assert found["native"]["loaded"] == _native.LOADED
    assert found["native"]["reason"] == _native.REASON
    assert found["cuda"]["available"] == torch.cuda.is_available()
    assert len(found["cuda"]["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_info_says_which_instruction_set_runs() -> None:
    native = info()["native"]
    if native["loaded"]:
        assert native["isa"] == native["isas_available"][-1]
        assert set(native["isas_available"]) <= set(native["isas_built"])


@pytest.mark.parametrize("name", [*evakernels.ops.__all__, "checkpoint_policy", "clip_grad_norm_"])
def test_the_example_is_right(name):
    names = {"torch": torch, "evakernels": evakernels}
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(evakernels, name), name, globs=names)
    assert test.examples
    report: list[str] = []
    assert not doctest.DocTestRunner().run(test, out=report.append).failed, "".join(report)
