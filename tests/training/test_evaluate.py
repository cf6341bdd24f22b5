"""Which pictures the figures of the model card are about."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import evaluate
from captions import UNSEEN_STYLE, starred, things, unseen
from data import STYLES, Item
from evaluate import Draw, Draws


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Draw]]:
    """What is drawn for each figure, of names with a star, listed ones, and two others, one of them held out."""
    rest = [name for name in things() if name not in starred()]
    most = sorted(starred())
    odd = [next(name for name in most if unseen(name, UNSEEN_STYLE) == kept) for kept in (True, False)]
    names = [*odd, most[0], *rest[:2], "no such thing", "nor such"]
    items = [Item(name, style, name, "group", [], [], False) for name in dict.fromkeys(names) for style in STYLES]
    items = [dataclasses.replace(item, held_out=item.name == "nor such") for item in items]
    pictures = np.zeros((len(items), 256, 256, 4), np.uint8)
    return {key: draws for key, (draws, _) in evaluate.tests(Draws(pictures, items), list(things()), 40).items()}


def test_what_was_kept_from_training_is_measured_apart(drawn: dict[str, list[Draw]]) -> None:
    assert all(unseen(draw.name, draw.style) for draw in drawn["unseen"])
    for key in ("seen", "transfer_shown"):
        assert not any(unseen(draw.name, draw.style) for draw in drawn[key])
    assert {draw.style for draw in drawn["seen"]} == {UNSEEN_STYLE}
    assert {draw.style for draw in drawn["transfer_shown"]} == set(STYLES)
    assert any(unseen(draw.name, draw.style) for draw in drawn["transfer"])


def test_the_names_are_those_that_the_card_says(drawn: dict[str, list[Draw]]) -> None:
    for key, draws in drawn.items():
        names = {draw.name for draw in draws}
        if key == "transfer_other":
            assert names == {"nor such"}
        elif key.endswith("_rest"):
            assert names <= set(things()) - starred()
        else:
            assert names <= starred()
