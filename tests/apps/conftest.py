"""A folder of small pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import picture


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures whose names are their captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, name in enumerate(("red_apple", "a cat-1", "a cat-2")):
        picture(70 + 9 * seed, 64, seed=seed).save(folder / f"{name}.png")
    return folder
