"""The sweep, its sheet, and the measure of faithfulness under each picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import picture
from sdedit.apps.measures import l2_distance
from sdedit.apps.sheets import contact_sheet


def test_each_picture_is_what_its_strength_gives(pipe: Any) -> None:
    swept = pipe.sweep(picture(), "apple", (0.25, 0.5, 1.0), torch.Generator().manual_seed(4), num_inference_steps=4)
    assert swept.steps == [1, 2, 4]
    for strength, image in zip(swept.strengths, swept.images, strict=True):
        one = torch.Generator().manual_seed(4)
        alone = pipe("apple", picture(), strength=strength, num_inference_steps=4, generator=[one]).images[0]
        assert np.abs(np.asarray(image).astype(int) - np.asarray(alone)).max() <= 1
    assert swept.distances == [l2_distance(image, picture()) for image in swept.images]


def test_sheet_and_animation(pipe: Any, tmp_path: Path) -> None:
    swept = pipe.sweep(picture(), "apple", (0.5, 1.0), num_inference_steps=2)
    swept.save(tmp_path / "a.gif")
    swept.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.gif") as animation, Image.open(tmp_path / "a.png") as sheet:
        assert animation.n_frames == 2 and animation.size == (64, 48)
        assert sheet.width > 2 * 64 and sheet.height > 48


def test_l2_distance() -> None:
    white, black = Image.new("RGB", (64, 64), "white"), Image.new("L", (32, 32), 0)
    assert l2_distance(white, white) == 0
    assert l2_distance(white, black) == pytest.approx((256 * 256 * 3) ** 0.5)
    assert l2_distance(Image.new("RGBA", (64, 64)), white) == 0  # what is clear counts as white


def test_contact_sheet_holds_every_picture() -> None:
    colours = ["red", "green", "blue", "yellow", "black"]
    sheet = contact_sheet([Image.new("RGB", (20, 10), c) for c in colours], ["one\ntwo"] * 5, columns=3)
    found = {colour for _, colour in sheet.getcolors(10_000) or []}
    assert {Image.new("RGB", (1, 1), c).getpixel((0, 0)) for c in colours} <= found
    with pytest.raises(ValueError, match="expected as many"):
        contact_sheet([Image.new("RGB", (8, 8))], ["a", "b"])
