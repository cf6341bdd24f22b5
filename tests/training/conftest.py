"""The recipe's scripts import each other by plain names, as scripts in one folder do."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder of its own for each test."""
    monkeypatch.setenv("SDEDIT_TRAINING", str(tmp_path / "work"))
    return tmp_path / "work"


@pytest.fixture
def disc() -> np.ndarray:
    """A red disc with a blue spot, RGBA, 256x256."""
    y, x = np.mgrid[:256, :256]
    picture = np.zeros((256, 256, 4), np.uint8)
    picture[(x - 128) ** 2 + (y - 128) ** 2 < 110**2] = (220, 40, 50, 255)
    picture[(x - 100) ** 2 + (y - 100) ** 2 < 24**2] = (50, 120, 210, 255)
    return picture
