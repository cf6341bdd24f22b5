"""Compositing: where the paste lies, what may change around it, and what a cut-out must be."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from conftest import picture
from sdedit.apps.composite import paste


def cutout(size: int = 20, colour: tuple[int, int, int] = (255, 0, 0)) -> Image.Image:
    """A square of a colour in the middle of twice its size, clear around."""
    image = Image.new("RGBA", (2 * size, 2 * size))
    ImageDraw.Draw(image).rectangle((size // 2, size // 2, size * 3 // 2 - 1, size * 3 // 2 - 1), fill=colour)
    return image


def test_the_paste_and_its_mask() -> None:
    background = picture(100, 80)
    made = paste(background, [cutout(), cutout(colour=(0, 0, 255))], [(5, 10), (70, -10)], [1, 0.5], margin=3)
    got, mask = np.asarray(made.image), np.asarray(made.mask)
    want, shape = np.array(background), np.zeros((80, 100), dtype=bool)
    want[20:40, 15:35], shape[20:40, 15:35] = (255, 0, 0), True  # 5 + 10, 10 + 10
    assert np.array_equal(got[:, :60], want[:, :60])
    assert (
        np.abs(got[:4, 77:83].astype(int) - (0, 0, 255)).max() < 8
    )  # 70 + 5 by half, -10 + 5: half of it is above the border
    grown = np.zeros_like(shape)
    grown[17:43, 12:38] = True
    assert np.array_equal(mask[:, :60] == 255, grown[:, :60]) and set(np.unique(mask)) == {0, 255}
    assert np.array_equal(got[mask == 0], np.asarray(background)[mask == 0])


def test_edges_keep_the_cutouts_colour_when_it_is_scaled() -> None:
    """Below clear pixels there is black, which must not come in."""
    made = paste(Image.new("RGB", (60, 60), "white"), cutout(), (0, 0), 0.7)
    red = np.asarray(made.image)[..., 0]
    assert red.min() >= 250


def test_around_the_paste_all_stays(pipe: Any) -> None:
    background = picture(64, 48)
    made = pipe.composite(
        background, cutout(8), "a red square", (20, 12), margin=4,
        generator=torch.Generator().manual_seed(0), num_inference_steps=4,
    )  # fmt: skip
    stays = np.asarray(made.mask) == 0
    assert np.array_equal(np.asarray(made.result)[stays], np.asarray(background)[stays])
    assert not np.array_equal(np.asarray(made.result), np.asarray(made.image))
    again = pipe(
        "a red square", made.image, mask_image=made.mask, mask_feather=4, strength=0.5,
        generator=torch.Generator().manual_seed(0), num_inference_steps=4,
    )  # fmt: skip
    assert again.images[0].tobytes() == made.result.tobytes()


def test_colours_are_matched_on_request() -> None:
    """The cut-out's visible pixels get the background's means; clear ones and their shape do not count."""
    rng = np.random.default_rng(0)
    background = Image.fromarray(rng.normal((60, 120, 200), 12, (64, 64, 3)).clip(0, 255).astype(np.uint8))
    bright = cutout(24)
    bright.paste(Image.fromarray(rng.integers(100, 256, (24, 24, 3), dtype=np.uint8)), (12, 12))
    plain, matched = (paste(background, bright, (0, 0), match_colours=m) for m in (False, True))
    inside = (slice(12, 36), slice(12, 36))
    assert np.asarray(matched.mask).tobytes() == np.asarray(plain.mask).tobytes()
    means = np.asarray(matched.image)[inside].mean((0, 1))
    assert np.abs(means - (60, 120, 200)).max() < 3
    assert np.abs(np.asarray(plain.image)[inside].mean((0, 1)) - (60, 120, 200)).max() > 50


def test_without_scikit_image_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("skimage"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install 'sdedit"):
        paste(picture(), cutout(), (0, 0), match_colours=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cutouts": picture()}, r"cutouts\[0\]: nothing in it is transparent, or all, .*expected a PNG or WebP whose"),
        ({"cutouts": Image.new("RGBA", (9, 9), "red")}, r"cutouts\[0\]: nothing in it is transparent"),
        ({"cutouts": Image.new("RGBA", (9, 9))}, r"cutouts\[0\]: nothing in it is transparent, or all"),
        ({"cutouts": []}, "composite: 0 cut-outs"),
        ({"cutouts": [cutout()], "at": [(0, 0), (1, 1)]}, "1 cut-outs, 2 places"),
        ({"scale": [1.0, 2.0]}, "1 cut-outs, 1 places .* 2 scales"),
        ({"scale": 0}, r"scale\[0\]=0"),
        ({"at": 5}, r"at\[0\]=5; expected \(x, y\)"),
        ({"at": (500, 0)}, r"at\[0\]=\(500, 0\): there, a cut-out of 40×40 lies outside the 64×48 picture"),
        ({"at": (0, -40)}, "lies outside"),
        ({"margin": -1}, "margin=-1"),
    ],
)
def test_what_is_wrong_is_said(arguments: dict[str, Any], message: str) -> None:
    given = {"background": picture(), "cutouts": cutout(), "at": (0, 0), **arguments}
    with pytest.raises(ValueError, match=message):
        paste(**given)
