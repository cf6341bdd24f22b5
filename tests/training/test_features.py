from __future__ import annotations

import numpy as np
import pytest

from data import SIZE, Item
from features import Judge, find_themselves, moved

STYLES = ("plain", "striped")


def picture(thing: int, style: str) -> np.ndarray:
    """A polygon-like spot, a form and colour for each thing; one style is striped."""
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    inside = radius < 45 + 12 * np.cos((2 + thing % 4) * angle + thing)
    colour = np.random.default_rng(thing).integers(20, 235, 3)
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rgba[inside] = (*colour, 255)
    if style == "striped":
        rgba[inside & (x.astype(int) % 8 < 3)] = (*(colour // 2), 255)
    return rgba


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, list[Item]]:
    shown = [(thing, style) for thing in range(40) for style in STYLES]
    items = [Item(f"thing {thing}", style, str(thing), "group", [], [], False) for thing, style in shown]
    return np.stack([picture(thing, style) for thing, style in shown]), items


def test_moved_pictures_find_themselves(real: tuple[np.ndarray, list[Item]]) -> None:
    found = find_themselves(*real, count=16)
    assert found["thing"] > 0.9
    assert found["style"] > 0.9


def test_thing_and_style_are_told_apart(real: tuple[np.ndarray, list[Item]]) -> None:
    pictures, items = real
    judge = Judge(pictures, items)
    rng = np.random.default_rng(0)
    rows = range(0, len(items), 7)
    assert judge.nearest([moved(pictures[row], rng) for row in rows]) == [
        (items[row].name, items[row].style) for row in rows
    ]
    noise = [rng.random((SIZE, SIZE, 3)).astype(np.float32) for _ in range(40)]
    assert np.mean([name == "thing 3" for name, _ in judge.nearest(noise)]) < 1
