"""`--device`, `--backend` and `--test-seconds` of the op tests."""

import faulthandler
import os
from collections.abc import Generator

import on_device
import pytest
import torch

import evakernels

BUILDS = ("cpu", "nvcc", "triton", "newest triton", "triton bfloat16", "triton edges")
"""Builds of the kernels: for CPUs, PTX of nvcc, and PTX of Triton: of 8.0 and 9.0, 9.0 only, in bfloat16 only, and
edge cases in every dtype."""
BUILDS += ("small gpu", "a100", "h100", "b200", "triton launches")
"""PTX of nvcc on one GPU, and PTX of Triton, for test_gpu_launches.py."""


@pytest.fixture
def one_process() -> Generator[None, None, None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the op tests' tensors are, e.g. cuda; default: cpu")
    parser.addoption("--backend", help="the only one that may serve an op; what it refuses is skipped")

    help = f"only tests marked for this build of the kernels, of {', '.join(BUILDS)}; `nvcc=bfloat16`: in these dtypes"
    parser.addoption("--kernels", action="append", default=[], help=help)

    help = "end the process after a test of this length or with a broken GPU context; pytest-xdist starts another"
    parser.addoption("--test-seconds", type=float, help=help)


def pytest_configure(config: pytest.Config) -> None:
    kernels = "kernels(*builds): runs on these builds of the kernels too; default: cpu, nvcc, triton"
    config.addinivalue_line("markers", f"{kernels}. A parameter's mark replaces its test's")
    config.addinivalue_line("markers", "cpu_only(reason): makes no sense with --device cuda")
    on_device.use(config.getoption("--device", "cpu"), config.getoption("--backend", None))


def runs_on(item: pytest.Item, kernels: dict[str, str]) -> bool:
    """Whether a test is marked for one of the builds and has no other dtypes than that build's, if it names some."""
    callspec, marks = getattr(item, "callspec", None), list(item.iter_markers("kernels"))
    inner = [mark for mark in callspec.marks if mark.name == "kernels"] if callspec else []
    if len(marks) == len(inner):
        return False
    builds = (inner or marks)[0].args or ("cpu", "nvcc", "triton")
    assert set(builds) <= set(BUILDS), (item.nodeid, builds)
    values = callspec.params.values() if callspec else ()
    dtypes = {str(value).removeprefix("torch.") for value in values if isinstance(value, torch.dtype)}
    return any(not kernels[build] or dtypes <= set(kernels[build].split(",")) for build in builds if build in kernels)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if kernels := dict(build.partition("=")[::2] for build in config.getoption("--kernels", None) or ()):
        assert kernels.keys() <= set(BUILDS), kernels
        chosen = {item for item in items if runs_on(item, kernels)}
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
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
