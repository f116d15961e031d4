"""`--device`, `--backend` and `--test-seconds` of the op tests."""

import faulthandler
import os
from collections.abc import Generator

import on_device
import pytest
import torch

import evakernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the op tests' tensors are, e.g. cuda; default: cpu")
    parser.addoption("--backend", help="the only one that may serve an op; what it refuses is skipped")

    help = "end the process after a test of this length or with a broken GPU context; pytest-xdist starts another"
    parser.addoption("--test-seconds", type=float, help=help)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only(reason): makes no sense with --device cuda")
    on_device.use(config.getoption("--device", "cpu"), config.getoption("--backend", None))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if on_device.DEVICE.type == "cpu":
        return
    for item in items:
        if marker := item.get_closest_marker("cpu_only"):
            item.add_marker(pytest.mark.skip(reason=f"of the CPU: {marker.args[0]}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    limit = item.config.getoption("--test-seconds", None)
    if limit is None:
        return (yield)
    faulthandler.dump_traceback_later(limit, exit=True)
    try:
        result = yield
        if on_device.DEVICE.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:  # after an illegal access every later call fails, too
        os._exit(1)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    backend = pyfuncitem.config.getoption("--backend", None)
    if backend is None:
        return (yield)
    try:
        with evakernels.use_backend(backend):
            return (yield)
    except Exception as error:
        if refusal := on_device.refusal_in(error, backend):
            pytest.skip(refusal)
        raise
