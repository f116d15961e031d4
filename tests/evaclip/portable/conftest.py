"""The model of these tests."""

import pytest
from lively_model import lively

from evaclip.model.clip import CLIP


@pytest.fixture(scope="session")
def model() -> CLIP:
    return lively(vision={"layers": 2}, text={"layers": 2})
