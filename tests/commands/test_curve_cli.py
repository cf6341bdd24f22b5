"""`sdedit strokes`, `sdedit search` and `sdedit evaluate` as a user types them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import picture
from sdedit.apps.measures import l2_faithfulness
from sdedit.apps.strokes import simulate_strokes
from sdedit.commands.cli import app
from sdedit.commands.metadata import read_settings


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
    assert sdedit("again", "--trust", "out.png", "-o", "twice.png").exit_code == 0
    assert np.abs(pixels("out.png") - pixels("twice.png")).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--faithful", 2), "'--faithful'"),
        (("--measure", "lpips"), "--measure lpips; expected one of l2, ssim"),
        (("--candidates", 0), "'--candidates'"),
        (("--steps", 0), "'--steps'"),
    ],
)
def test_search_refuses(work: Path, folder: Path, arguments: tuple[object, ...], message: str) -> None:
    ran = sdedit("search", "in.png", "a", "-o", "o.png", "--model", folder, *arguments)
    assert ran.exit_code != 0 and message in f"{ran.stderr} {ran.exception}"
    assert sorted(path.name for path in work.iterdir()) == ["in.png"]


def test_search_asks(work: Path, folder: Path) -> None:
    settings = ("--model", folder, "--steps", 2, "--seed", 7, "--size", "original", "--candidates", 2)
    ran = sdedit("search", "in.png", "apple", "-o", "out.png", "--ask", *settings, typed="0\n2\n0\n")
    assert ran.exit_code == 0, ran.output
    assert read_settings(work / "out.png").strength == 0.5
    assert "3 candidates are on out-sheet.png\nWhich is best, 1 to 3:" in ran.stderr
    assert "0; expected 1 to 3" in ran.stderr and "(0: number 3, chosen before, will do)" in ran.stderr
    assert pixels("out-sheet.png").shape[1] > 2 * 60


def test_evaluate_draws_a_table_and_a_plot(work: Path, folder: Path) -> None:
    Path("photos").mkdir()
    for i in range(3):
        picture(80, 64, seed=i).save(f"photos/red_apple-{i}.png")
    command = ("evaluate", "photos", "-o", "curve.csv", "--model", folder, "--strengths", "0.5,1", "--steps", 2)
    ran = sdedit(*command, "--scheduler", "ddpm", "--repeats", 2, "--batch", 4, "--side", 64)
    assert ran.exit_code == 0, ran.output
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("guides: L2 0.0, kernel distance on wavelet features ")
    assert [line.split(":")[0] for line in lines[2:5]] == ["strength 0", "strength 0.5", "strength 1"]
    assert lines[5:] == ["curve.csv", "curve.png"]
    assert len(list(Path("curve-pictures").rglob("*.png"))) == 4 * 3
    table = Path("curve.csv").read_text(encoding="utf-8").splitlines()
    assert table[0].startswith("what,strength,pictures,l2,l2_low,l2_high,wavelet_kernel_distance,") and len(table) == 6
    with Image.open("curve.png") as plot:
        assert plot.size == (1200, 400)
    refused = sdedit(*command, "--side", 64)
    assert "drawn otherwise (num_inference_steps" not in str(refused.exception)
    assert "drawn otherwise (repeats, scheduler)" in str(refused.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("photos", "-o", "curve.csv"), "photos: expected a folder"),
        ((".", "-o", "curve.png"), "such as table.csv"),
        ((".", "-o", "curve.csv"), "expected at least two"),
        ((".", "-o", "curve.csv", "--strengths", "a"), "expected numbers with commas"),
    ],
)
def test_evaluate_refuses(work: Path, folder: Path, arguments: tuple[str, ...], message: str) -> None:
    ran = sdedit("evaluate", *arguments, "--model", folder)
    assert message in str(ran.exception)
    assert sorted(path.name for path in work.iterdir()) == ["in.png"]
