"""Simulated strokes: few colours, the same size, flat where the picture is flat, for every kind of picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy import ndimage

from conftest import picture
from sdedit.apps.strokes import simulate_strokes

few_colours = arrays(np.uint8, (12, 15), elements=st.integers(0, 4)).flatmap(
    lambda index: arrays(np.uint8, (5, 3)).map(lambda palette: Image.fromarray(palette[index]))
)


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}


@settings(max_examples=50, deadline=None)
@given(arrays(np.uint8, (12, 15, 3)), st.integers(1, 9), st.sampled_from([1, 3, 5, 31]))
def test_size_is_kept_and_colours_are_few(array: np.ndarray, count: int, kernel: int) -> None:
    strokes = simulate_strokes(Image.fromarray(array), count, kernel)
    assert strokes.size == (15, 12) and strokes.mode == "RGB"
    assert len(colours(strokes)) <= count


@settings(max_examples=50, deadline=None)
@given(few_colours)
def test_a_picture_of_few_colours_is_median_filtered_and_no_more(image: Image.Image) -> None:
    """SciPy's median filter is the reference; a palette with room for every colour changes none."""
    expected = ndimage.median_filter(np.asarray(image), size=(3, 3, 1), mode="nearest")
    assert np.array_equal(np.asarray(simulate_strokes(image, 256, 3)), expected)


@settings(max_examples=50, deadline=None)
@given(few_colours, st.integers(1, 5))
def test_flat_regions_stay_flat(image: Image.Image, count: int) -> None:
    """Where a pixel's whole neighbourhood has one colour, what becomes of it depends on that colour alone."""
    before, after = np.asarray(image).astype(int), np.asarray(simulate_strokes(image, count, 3))
    flat = ndimage.maximum_filter(before, (3, 3, 1)) == ndimage.minimum_filter(before, (3, 3, 1))
    became: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for at in zip(*np.nonzero(flat.all(-1)), strict=True):
        became.setdefault(tuple(before[at]), set()).add(tuple(after[at]))
    assert all(len(colours) == 1 for colours in became.values())


def test_what_is_thinner_than_half_the_brush_goes() -> None:
    image = Image.new("RGB", (64, 64), "white")
    image.paste((200, 30, 40), (10, 10, 50, 50))
    image.paste((0, 0, 0), (0, 30, 64, 32))
    assert colours(simulate_strokes(image, 6, 11)) == {(255, 255, 255), (200, 30, 40)}


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "F"])
def test_every_mode(mode: str) -> None:
    grey = Image.fromarray((np.linspace(0, 1, 24 * 16).reshape(16, 24) * 65535).astype(np.uint16))
    deep = {"I;16": grey, "F": Image.fromarray(np.linspace(0, 1, 24 * 16, dtype=np.float32).reshape(16, 24))}
    image = deep[mode] if mode in deep else picture(24, 16).convert("LA" if mode == "PA" else "RGB").convert(mode)
    strokes = simulate_strokes(image, 4, 3)
    assert strokes.size == (24, 16) and len(colours(strokes)) <= 4
    assert strokes.mode == ("RGBA" if mode in ("RGBA", "LA", "PA") else "RGB")


def test_alpha_is_given_back_and_clear_is_white() -> None:
    alpha = np.zeros((16, 16), np.uint8)
    alpha[4:, :] = np.arange(16) * 17
    image = Image.merge("RGBA", [*Image.new("RGB", (16, 16), (20, 40, 60)).split(), Image.fromarray(alpha)])
    strokes = simulate_strokes(image, 3, 5)
    assert np.array_equal(np.asarray(strokes.getchannel("A")), alpha)
    assert strokes.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_it_stands_upright() -> None:
    sideways = picture(24, 16)
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.info["exif"] = exif.tobytes()
    assert simulate_strokes(sideways, 3, 3).size == (16, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colors": 0}, "colors=0; expected a whole number of at least 1"),
        ({"colors": 300}, "at most 256"),
        ({"colors": 2.5}, "colors=2.5"),
        ({"kernel": 4}, "kernel=4; expected an odd number, such as 5"),
        ({"kernel": -3}, "kernel=-3"),
        ({"image": Path("in.png")}, "expected a PIL image"),
        ({"image": Image.new("RGB", (4, 4))}, "at least 8 on each side"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        simulate_strokes(**{"image": picture(), **arguments})  # type: ignore[arg-type]
