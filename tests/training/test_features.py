from __future__ import annotations

import numpy as np
import pytest

from data import SIZE, Item
from features import Judge, fit_rows, moved, share_right

STYLES = ("plain", "striped")


def picture(thing: int, style: str) -> np.ndarray:
    """A polygon-like spot, a form and colour for each thing; one style is striped."""
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    inside = radius < 90 + 24 * np.cos((2 + thing % 4) * angle + thing)
    colour = np.random.default_rng(thing).integers(20, 235, 3)
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rgba[inside] = (*colour, 255)
    if style == "striped":
        rgba[inside & (x.astype(int) % 16 < 6)] = (*(colour // 2), 255)
    return rgba


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, list[Item]]:
    shown = [(thing, style) for thing in range(40) for style in STYLES]
    items = [Item(f"thing {thing}", style, str(thing), "group", [], [], False) for thing, style in shown]
    return np.stack([picture(thing, style) for thing, style in shown]), items


def test_moved_pictures_find_themselves(real: tuple[np.ndarray, list[Item]]) -> None:
    pictures, items = real
    judge, rng = Judge(pictures, items), np.random.default_rng(0)
    assert judge.real["draws"] == len(fit_rows(items)[1]) == 16
    assert judge.real["thing"] > 0.9
    assert judge.real["style"] > 0.9
    rows = range(0, len(items), 7)
    assert judge.nearest(moved(pictures[row], rng) for row in rows) == [items[row] for row in rows]


def test_shares_count_things_and_styles_apart() -> None:
    items = [Item(name, style, name, "group", [], [], False) for name, style in (("a", "x"), ("b", "x"), ("c", "y"))]
    right = share_right(items, [("a", "x"), ("b", "y"), ("z", "x")])
    assert right == {"thing": pytest.approx(2 / 3), "style": pytest.approx(1 / 3), "draws": 3}
