from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from captions import UNSEEN_STYLE, caption, things, training_rows, unseen
from data import SIZE, Item
from guides import KINDS, SIDE, WHITE, background, doodle, ground, guided, place


def item(name: str = "automobile", style: str = "3d") -> Item:
    return Item(name, style, "1f697", "travel-places", ["vehicle"], ["red", "gray"], False)


@pytest.mark.parametrize("seed", range(12))
def test_a_guide_of_each_kind(disc: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = guided(place(disc, rng), background(rng), rng)
    assert len(images) == len(KINDS)
    assert {(image.size, image.mode) for image in images} == {((SIZE, SIZE), "RGB")}
    true = np.asarray(images[0], np.float32)
    for kind, image in zip(KINDS[1:], images[1:], strict=True):
        difference = np.abs(np.asarray(image, np.float32) - true).mean()
        assert 0 < difference < 110, kind  # it is drawn otherwise, and it is still the same place and thing


def test_placed_pictures_are_of_all_sizes_and_anywhere(disc: np.ndarray) -> None:
    boxes = [place(disc, np.random.default_rng(n)).getchannel("A").getbbox() for n in range(60)]
    widths = [right - left for left, _, right, _ in boxes]
    middles = [(left + right) / 2 for left, _, right, _ in boxes]
    assert min(widths) < 130 < 200 < max(widths) <= SIZE
    assert min(middles) < 90 and max(middles) > 166


def test_grounds_are_about_their_colour() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert np.asarray(ground(WHITE, rng)).mean() > 190
        assert np.asarray(ground((120, 160, 90), rng)).mean((0, 1)) == pytest.approx((120, 160, 90), abs=12)


def test_doodles_are_filled_or_in_lines_or_faint(disc: np.ndarray) -> None:
    sheet, white = Image.fromarray(disc).resize((SIDE, SIDE)), Image.new("RGB", (SIDE, SIDE), WHITE)
    rngs = [np.random.default_rng(n) for n in range(40)]
    drawn = [np.asarray(doodle(sheet, white, rng), np.float32) for rng in rngs]
    middle = [image[80:100, 60:80].mean() for image in drawn]  # of the red disc, beside its spot
    assert sum(value > 250 for value in middle) >= 2  # lines alone
    assert sum(value < 130 for value in middle) >= 15  # filled
    assert sum(130 < value < 230 for value in middle) >= 2  # faint
    assert all(image.min() < 200 for image in drawn)


def test_captions_name_the_thing() -> None:
    captions = [caption(item(), np.random.default_rng(n)) for n in range(300)]
    words = ["automobile", *things()["automobile"]]
    assert 10 < captions.count("") < 60
    assert all(any(word in text for word in words) for text in captions if text)
    assert 150 < sum("3d" in text for text in captions) < 270
    assert len(set(captions)) > 50


def test_half_the_names_are_unseen_in_one_style() -> None:
    items = [item(name, style) for name in things() for style in ("3d", "flat", "noto", "twemoji")]
    kept = {(items[row].name, items[row].style) for row in training_rows(items)}
    missing = [(i.name, i.style) for i in items if (i.name, i.style) not in kept]
    assert {style for _, style in missing} == {UNSEEN_STYLE}
    assert 0.4 < len(missing) / len(things()) < 0.6
    assert all(unseen(*pair) for pair in missing)


def test_things_that_are_not_listed_are_learned_unless_held_out() -> None:
    other = item("no such thing")
    assert training_rows([other, dataclasses.replace(other, held_out=True), item()]) == [0, 2]
