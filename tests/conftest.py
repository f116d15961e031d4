import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first: where tests run side by side, no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
