r"""A pytest plugin that accelerates every model and loss that timm and open_clip build.

It runs the tests in the libraries' sdists against accelerated models, with ops at every size. With `ACCELERATED=0` the
same tests run against the original models.

    export HF_HUB_OFFLINE=1 PYTHONPATH=$PWD:$PWD/tests/evakernels/dropin/peer_tests
    pytest -p accelerated timm-1.0.31/tests/test_models.py -k "eva02_tiny and not torchscript and not pretrained"
    pytest -p accelerated open_clip_torch-3.3.0/tests/test_training_simple.py -k unfreezing
"""

import os
from collections import Counter
from functools import wraps

import open_clip
import timm
import torch

import evakernels

_ON = os.environ.get("ACCELERATED", "1") == "1"
_counts: Counter[str] = Counter()


def _accelerated(build):
    @wraps(build)
    def built(*args, **kwargs):
        model = build(*args, **kwargs)
        for part in model if isinstance(model, tuple) else (model,):
            if isinstance(part, torch.nn.Module):
                _counts.update(done.op for done in evakernels.accelerate(part, force=True).replaced)
        return model

    return built


def _patch(function: str, *modules) -> None:
    original = getattr(modules[0], function)
    for module in modules:
        setattr(module, function, _accelerated(original))


if _ON:
    _patch("create_model", timm.models._factory, timm.models, timm)
    _patch("create_model", open_clip.factory, open_clip)
    _patch("create_loss", open_clip.factory, open_clip)


def pytest_terminal_summary(terminalreporter):
    found = ", ".join(f"{op}: {count}" for op, count in _counts.most_common())
    terminalreporter.write_line(f"accelerated modules: {found or 'none'}")
