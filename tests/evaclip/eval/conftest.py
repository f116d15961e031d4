"""Fixtures of the evaluation's tests."""

from pathlib import Path

import pytest
from eval_fakes import COLORS, ColorModel, png, write_tar


@pytest.fixture
def color_model() -> ColorModel:
    return ColorModel()


@pytest.fixture
def color_shard(tmp_path: Path) -> Path:
    """One sample per colour: its picture, its name (txt), its place in COLORS (cls)."""
    samples = {
        f"{number:03d}": {"png": png(color), "txt": name.encode(), "cls": str(number).encode()}
        for number, (name, color) in enumerate(COLORS.items())
    }
    return write_tar(tmp_path / "colors.tar", samples)
