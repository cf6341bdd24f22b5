"""`sdedit strokes`, `sdedit search` and `sdedit evaluate` as a user types them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import picture
from sdedit.cli import app
from sdedit.measures import l2_faithfulness
from sdedit.metadata import read_settings
from sdedit.strokes import simulate_strokes


def sdedit(*arguments: object, typed: str = "") -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)), input=typed)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which commands run, with an input image in it."""
    monkeypatch.chdir(tmp_path)
    picture(60, 44).save("in.png")
    return tmp_path


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened).astype(int)


def test_strokes(work: Path) -> None:
    ran = sdedit("strokes", "in.png", "-o", "strokes.png", "--colors", 4, "--kernel", 5)
    assert ran.exit_code == 0 and ran.stdout == "strokes.png\n"
    assert np.array_equal(pixels("strokes.png"), np.asarray(simulate_strokes(picture(60, 44), 4, 5)))


def test_search_writes_what_again_draws(work: Path, folder: Path) -> None:
    settings = ("--model", folder, "--steps", 2, "--seed", 7, "--size", "original", "--guidance", 2)
    ran = sdedit("search", "in.png", "apple", "-o", "out.png", "--faithful", 0.72, "--tolerance", 0.2, *settings)
    assert ran.exit_code == 0, ran.output
    with Image.open("out.png") as drawn:
        strength, reached = read_settings(work / "out.png").strength, l2_faithfulness(drawn, picture(60, 44))
    assert f"strength {strength:.3f}: {reached:.3f} faithful by l2" in ran.stdout
    assert "UNet calls for" in ran.stderr
    assert sdedit("again", "out.png", "-o", "twice.png").exit_code == 0
    assert np.abs(pixels("out.png") - pixels("twice.png")).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--faithful", 2), "faithful=2"),
        (("--measure", "lpips"), "expected one of l2, ssim"),
        (("--candidates", 0), "candidates=0"),
        (("--steps", 0), "num_inference_steps=0"),
    ],
)
def test_search_refuses(work: Path, folder: Path, arguments: tuple[object, ...], message: str) -> None:
    ran = sdedit("search", "in.png", "a", "-o", "o.png", "--model", folder, *arguments)
    assert isinstance(ran.exception, ValueError) and message in str(ran.exception)
    assert sorted(path.name for path in work.iterdir()) == ["in.png"]


def test_search_asks(work: Path, folder: Path) -> None:
    settings = ("--model", folder, "--steps", 2, "--seed", 7, "--size", "original", "--candidates", 2)
    ran = sdedit("search", "in.png", "apple", "-o", "out.png", "--ask", *settings, typed="0\n2\n0\n")
    assert ran.exit_code == 0, ran.output
    assert read_settings(work / "out.png").strength == 0.5
    assert "3 candidates are on out-sheet.png\nWhich is best, 1 to 3:" in ran.stderr
    assert "0; expected 1 to 3" in ran.stderr and "(0: number 3, chosen before, will do)" in ran.stderr
    assert pixels("out-sheet.png").shape[1] > 2 * 60
