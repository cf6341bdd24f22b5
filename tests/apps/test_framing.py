from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from sdedit.apps.framing import framed
from sdedit.commands.cli import app
from sdedit.commands.metadata import read_settings


def sheet(size: tuple[int, int], at: tuple[int, int], colour: str = "white", mode: str = "RGB") -> Image.Image:
    """A red ellipse with a blue spot, 100x60, somewhere on a sheet."""
    image = Image.new("RGB", size, colour)
    draw = ImageDraw.Draw(image)
    left, top = at
    draw.ellipse((left, top, left + 99, top + 59), fill="red")
    draw.ellipse((left + 20, top + 20, left + 39, top + 39), fill="blue")
    return image.convert(mode)


@settings(deadline=None, max_examples=30)
@given(st.integers(8, 300), st.integers(8, 200), st.integers(8, 300), st.integers(8, 200))
def test_where_and_on_how_large_a_sheet_makes_no_difference(left: int, top: int, right: int, bottom: int) -> None:
    want = framed(sheet((116, 76), (8, 8)))
    got = framed(sheet((left + 100 + right, top + 60 + bottom), (left, top)))
    assert abs(got.width - want.width) <= 8  # a sheet of 700 is looked at in a smaller size: each edge is less sure
    assert got.width == got.height
    red, blue, green = np.asarray(got.resize((128, 128)), float).mean((0, 1)) - np.asarray(
        want.resize((128, 128)), float
    ).mean((0, 1))
    assert max(abs(red), abs(blue), abs(green)) < 9


def test_the_drawing_fills_the_sheet_but_for_the_margin() -> None:
    got = framed(sheet((400, 300), (250, 180)))
    drawn = np.abs(np.asarray(got, int) - 255).max(-1) > 24
    columns, rows = (np.flatnonzero(drawn.any(axis)) for axis in (0, 1))
    assert columns.size / got.width == pytest.approx(1 / 1.12, abs=0.03)
    assert (columns[0] + columns[-1]) / 2 == pytest.approx(got.width / 2, abs=2)
    assert (rows[0] + rows[-1]) / 2 == pytest.approx(got.height / 2, abs=2)


@pytest.mark.parametrize("colour", ["white", "#88ccaa", "#202030"])
def test_the_sheet_goes_on_in_its_colour(colour: str) -> None:
    got = framed(sheet((112, 64), (6, 2), colour))
    assert got.size == (112, 112)
    assert got.getpixel((0, 0)) == got.getpixel((111, 111)) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA"])
def test_all_modes(mode: str) -> None:
    assert framed(sheet((200, 150), (20, 20), mode=mode)).width == pytest.approx(112, abs=3)


def test_alpha_is_kept_and_new_parts_are_clear() -> None:
    image = Image.new("RGBA", (120, 60))
    image.paste(sheet((100, 60), (0, 0)), (20, 0), Image.new("L", (100, 60), 255))
    got = framed(image)
    assert got.mode == "RGBA"
    assert got.getpixel((0, 0))[3] == 0
    assert got.getchannel("A").getextrema() == (0, 255)


def test_photos_and_empty_sheets_are_left_alone() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((320, 240))
    for image in (photo, Image.new("RGB", (50, 40), "white"), Image.new("RGBA", (50, 40))):
        assert framed(image) is image


def test_specks_and_grain_are_not_drawn() -> None:
    pixels = np.asarray(sheet((300, 200), (100, 80)), int)
    grain = np.clip(pixels + np.random.default_rng(0).normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    grain[5, 290] = 0
    assert framed(Image.fromarray(grain)).width == pytest.approx(112, abs=3)


def test_run_and_again_frame_for_the_default_model(tmp_path: Path) -> None:
    sheet((300, 200), (180, 120)).save(tmp_path / "doodle.png")
    for command in (
        ["run", tmp_path / "doodle.png", "fish", "-o", tmp_path / "fish.png", "--steps", "3", "--seed", "0"],
        ["again", "--trust", tmp_path / "fish.png"],
        ["run", tmp_path / "doodle.png", "fish", "-o", tmp_path / "as-is.png", "--steps", "3", "--size", "original"],
    ):
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 0, result.output
    pictures = [Image.open(tmp_path / name) for name in ("fish.png", "fish-again.png", "as-is.png")]
    for picture in pictures:
        picture.load()  # and close the file
    assert [picture.size for picture in pictures] == [(256, 256), (256, 256), (300, 200)]
    assert [read_settings(picture.filename).framed for picture in pictures] == [True, True, False]
    assert np.array_equal(*map(np.asarray, pictures[:2]))


def test_paper_under_a_lamp_becomes_white_and_a_coloured_sheet_stays() -> None:
    pixels = np.asarray(sheet((300, 200), (100, 80)), float)
    y, x = np.mgrid[:200, :300] / 300
    lit = pixels * (0.95 - 0.35 * x - 0.1 * y)[..., None] * (1, 0.99, 0.95)
    got = np.asarray(framed(Image.fromarray(lit.astype(np.uint8))), float)
    want = np.asarray(framed(Image.fromarray(pixels.astype(np.uint8))), float)
    assert got.shape == pytest.approx(want.shape, abs=3)
    assert np.abs(got[3:-3, 3:-3] - want[3 : got.shape[0] - 3, 3 : got.shape[1] - 3]).mean() < 4
    assert np.median(got, (0, 1)).min() > 248
    coloured = framed(sheet((300, 200), (100, 80), "#bfe3f2"))
    assert coloured.getpixel((1, 1)) == (0xBF, 0xE3, 0xF2)
