"""`--device` and `--backend` of the op tests."""

from collections.abc import Generator

import on_device
import pytest

import evakernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the op tests' tensors are, e.g. cuda; default: cpu")
    parser.addoption("--backend", help="the only one that may serve an op; what it refuses is skipped")


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
