from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter
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


@pytest.mark.parametrize("colour", ["white", "#88ccaa", "#202030", "#3060c0"])
def test_a_sheet_of_any_colour_becomes_white(colour: str) -> None:
    got = framed(sheet((112, 64), (6, 2), colour))
    assert got.size == (112, 112)
    difference = np.abs(np.asarray(got, int) - np.asarray(framed(sheet((112, 64), (6, 2))), int))
    assert difference.mean() < 1


def test_chalk_on_a_board_keeps_the_board() -> None:
    image = Image.new("RGB", (160, 120), "#203028")
    ImageDraw.Draw(image).ellipse((30, 20, 120, 90), outline="white", width=5)
    got = framed(image)
    assert got.getpixel((0, 0)) == got.getpixel((got.width - 1, got.height - 1)) == (0x20, 0x30, 0x28)


def photo(seed: int, table: bool) -> Image.Image:
    """A round fruit before a wall that a lamp lights from one side; perhaps on a wooden table."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:192, :256] / 256
    pixels = np.stack([150 - 40 * x + 10 * y] * 3, -1) * (1, 0.98, 0.95)
    if table:
        wood = np.stack([110 + 60 * x, 80 + 40 * x, 50 + 20 * x], -1) + rng.normal(0, 8, (192, 256, 1))
        pixels[120:] = wood[120:]
    left, top, radius = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.5), rng.uniform(0.1, 0.25)
    right, down = (x - left) / radius, (y - top) / radius
    facing = 0.7 * np.sqrt(np.clip(1 - right**2 - down**2, 0, 1)) - 0.5 * right - 0.5 * down
    fruit = np.clip(0.3 + 0.7 * facing, 0, 1)[..., None] * (220, 60, 40)
    pixels = np.where((right**2 + down**2 < 1)[..., None], fruit, pixels) + rng.normal(0, 4, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000))
def test_a_photo_keeps_its_surroundings(seed: int) -> None:
    image = photo(seed, table=False)
    assert framed(image) is image


def test_most_photos_of_things_on_tables_do_too() -> None:
    """Some tables are taken for a change of light, and then a small fruit has little that is shaded."""
    photos = [photo(seed, table=True) for seed in range(30)]
    assert sum(framed(image) is image for image in photos) >= 25


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(0, 3))
def test_gradients_and_textures_are_no_sheets(seed: int, kind: int) -> None:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:120, :160] / 160
    if kind < 2:  # a sky; with waves below
        pixels = np.stack([90 + 120 * y, 140 + 80 * y, np.full_like(y, 230)], -1)
        pixels[70:] += kind * rng.uniform(50, 90) * np.sin(x * rng.uniform(20, 80) + y * 30)[70:, :, None]
    else:  # leaves, fine or coarse
        few = rng.integers(0, 256, (12 * kind, 16 * kind, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(few).resize((160, 120), Image.Resampling.BICUBIC), float)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    assert framed(image) is image


# A scene from edge to edge, shaded things, ruled paper and glowing lines: what becomes of them is not promised.
OTHERS = ("landscape", "tomato", "lined_butterfly", "neon_rocket")
EXAMPLES = [p for p in sorted((Path(__file__).parents[2] / "examples").glob("*.png")) if p.stem not in OTHERS]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("under_a_lamp", [False, True])
def test_doodles_are_framed_on_white(file: Path, under_a_lamp: bool) -> None:
    image = Image.open(file).convert("RGB")
    if under_a_lamp:
        pixels = np.asarray(image, float)
        y, x = np.mgrid[: image.height, : image.width] / image.width
        lit = pixels * (0.95 - 0.35 * x - 0.1 * y)[..., None] * (1, 0.99, 0.95)
        lit += np.random.default_rng(0).normal(0, 5, pixels.shape)
        image = Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
    got = framed(image)
    assert got is not image and got.width == got.height
    assert np.median(np.asarray(got)[:3], (0, 1)).min() >= 240


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


def test_paper_under_a_lamp_becomes_white() -> None:
    pixels = np.asarray(sheet((300, 200), (100, 80)), float)
    y, x = np.mgrid[:200, :300] / 300
    lit = pixels * (0.95 - 0.35 * x - 0.1 * y)[..., None] * (1, 0.99, 0.95)
    got = np.asarray(framed(Image.fromarray(lit.astype(np.uint8))), float)
    want = np.asarray(framed(Image.fromarray(pixels.astype(np.uint8))), float)
    assert got.shape == pytest.approx(want.shape, abs=3)
    assert np.abs(got[3:-3, 3:-3] - want[3 : got.shape[0] - 3, 3 : got.shape[1] - 3]).mean() < 4
    assert np.median(got, (0, 1)).min() > 248
