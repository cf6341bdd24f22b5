"""Where pictures go: what cannot be written is refused before anything is drawn, and what was drawn is never lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import picture
from sdedit.commands import drawing, saving
from sdedit.commands.cli import app
from sdedit.commands.metadata import read_settings
from sdedit.commands.saving import check_output, check_size, save_picture, surely
from sdedit.commands.settings import PictureSettings

MAIN = "from sdedit.commands.cli import main; main()"
# Every command that writes: what is typed before `-o OUT`.
WRITERS = {
    "run": ("run", "in.png", "a"),
    "again": ("again", "--trust", "old.png"),
    "sweep": ("sweep", "in.png", "a"),
    "search": ("search", "in.png", "a"),
    "composite": ("composite", "in.png", "in.png", "a", "--at", "1,1"),
    "strokes": ("strokes", "in.png"),
    "evaluate": ("evaluate", "."),
    "train": ("train", "lora", "."),
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which commands run; no model is ever loaded there."""
    monkeypatch.chdir(tmp_path)
    picture(60, 44).save("in.png")
    save_picture(picture(60, 44), "old.png", PictureSettings(image="in.png", steps=1, strength=1.0, guidance=1, seed=1))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    return tmp_path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "load_model", lambda *_a, **_k: pytest.fail("a model was loaded"))


def suffix(command: str) -> str:
    return {"evaluate": ".csv", "train": ".safetensors"}.get(command, ".png")


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("out", "expected a name such as"),
        ("out.xyz", "expected a name such as"),
        ("folder{}", "is a folder"),
        ("none/out{}", "none is no folder"),
        ("x" * 300 + "{}", "nothing can be written there"),
        ("/proc/out{}", "nothing can be written there"),
    ],
)
def test_every_command_checks_its_output_before_a_model_is_loaded(
    work: Path, no_model: None, command: str, output: str, message: str
) -> None:
    before = sorted(work.iterdir())
    ran = CliRunner().invoke(app, [*WRITERS[command], "-o", output.format(suffix(command))])
    assert isinstance(ran.exception, ValueError) and message in str(ran.exception)
    assert sorted(work.iterdir()) == before


def test_a_read_only_folder_is_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(saving.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match="Read-only file system"):
        check_output(Path("out.png"))


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.webp", "a.gif", "a.tif", "a.bmp", "a.ppm", "a.avif", "a.jp2"])
def test_formats_that_hold_pictures(work: Path, name: str) -> None:
    check_output(work / name)
    save_picture(picture(60, 44), work / name)
    with Image.open(work / name) as written:
        assert written.size == (60, 44)


@pytest.mark.parametrize("name", ["a.pdf", "a.xbm", "a.icns", "a.msp", "a.txt", "a.mp4", "a.png.part", ".png"])
def test_formats_that_do_not(work: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"expected a name such as out\.png"):
        check_output(work / name)


@pytest.mark.parametrize(("name", "size"), [("a.ico", (300, 8)), ("a.webp", (8, 17_000)), ("a.jpg", (66_000, 8))])
def test_sizes_that_a_format_does_not_hold(name: str, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"-o {name}: .* holds at most \d+ pixels on a side"):
        check_size(size, Path(name))
    check_size(size, Path("a.png"))
    check_size((200, 200), Path(name))


@pytest.mark.parametrize("count", [1, 3])
def test_a_picture_that_would_be_a_folder(work: Path, count: int) -> None:
    (work / "o-2.png").mkdir()
    if count == 1:
        return check_output(work / "o.png", count=count)
    with pytest.raises(ValueError, match=r"o-2\.png is a folder"):
        check_output(work / "o.png", count=count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strength", "nan"), "'--strength'"),
        (("--guidance", "inf"), "--guidance inf; expected a finite number"),
        (("--size", "8x4"), "--size 8x4; expected at least 8"),
        (("--size", "99999x99999"), "--size 99999x99999; expected at most 100 megapixels"),
        (("--lora", "x:nan"), "--lora x:nan; expected a finite weight"),
        (("--seed", str(2**64 - 1), "--count", "2"), f"--seed {2**64 - 1} with --count 2"),
        (("--strength", "2"), "'--strength'"),
        (("--steps", "1000000000"), "'--steps'"),
        (("--count", "1000000000"), "'--count'"),
        (("--repeats", "1000000000"), "'--repeats'"),
        (("--feather", "-1"), "'--feather'"),
        (("--seed", "-1"), "'--seed'"),
        (("--scheduler", "best"), "--scheduler best; expected one of ddim"),
        (("--dtype", "int8"), "--dtype int8; expected auto"),
        (("--backend", "tf"), "--backend tf; expected torch or jax"),
    ],
)
def test_numbers_are_refused_by_the_name_of_their_flag(
    work: Path, no_model: None, options: tuple[str, ...], message: str
) -> None:
    ran = CliRunner().invoke(app, ["run", "in.png", "a", "-o", "o.png", *options])
    assert ran.exit_code != 0 and message in " ".join(f"{ran.stderr} {ran.exception}".split())
    assert not Path("o.png").exists()


def test_jpeg_gets_white_for_what_was_clear(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    for name in ("a.jpg", "a.ppm"):
        save_picture(clear, tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.convert("RGB").getpixel((3, 3)) == (255, 255, 255)
    save_picture(clear, tmp_path / "a.webp")
    with Image.open(tmp_path / "a.webp") as image:
        assert image.has_transparency_data


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_picture(picture(), tmp_path / "a.png")
    with pytest.raises(OSError, match="nor could what was drawn be saved elsewhere"):
        surely(lambda path: save_picture(picture(), path), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that fills up once the drawing has begun; everything else can be written."""
    place = tmp_path / "full"
    place.mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(saving.tempfile, "tempdir", str(tmp_path / "temporary"))
    save = Image.Image.save

    def limited(self: Image.Image, path: Any, *arguments: Any, **options: Any) -> None:
        if isinstance(path, Path) and place in path.absolute().parents:
            raise OSError(28, "No space left on device")
        save(self, path, *arguments, **options)

    monkeypatch.setattr(Image.Image, "save", limited)
    return place


@pytest.mark.parametrize("command", ["run", "again", "sweep", "search", "strokes"])
def test_what_was_drawn_is_saved_elsewhere(work: Path, folder: Path, full: Path, command: str) -> None:
    model = () if command == "strokes" else ("--model", str(folder), "--steps", "2", "--size", "original")
    count = ("--count", "2") if command == "run" else ()
    own = {"sweep": ("--strengths", "0.5,1"), "search": ("--faithful", "0.6")}.get(command, ())
    ran = CliRunner().invoke(app, [*WRITERS[command], "-o", str(full / "o.png"), *model, *count, *own])
    assert isinstance(ran.exception, OSError), ran.output
    saved = sorted((work / "temporary").rglob("*.png"))
    assert len(saved) == (2 if count else 1) and list(full.iterdir()) == []
    assert all(f"; what was drawn is {path}" in str(ran.exception) for path in saved)
    assert all(str(path) in ran.stdout for path in saved)
    if command in ("run", "search"):  # from there, too
        assert (saved[0].parent / read_settings(saved[0]).image).resolve() == (work / "in.png").resolve()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("shell", "environment"),
    [
        ("{} >&-", {}),
        ("{} >&- 2>&-", {}),
        ("{} > /dev/full 2> /dev/full", {}),
        ("{} 2>&1 | true", {}),
        ("{}", {"PYTHONIOENCODING": "ascii:strict"}),
        ("{}", {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}),
    ],
)
def test_a_terminal_that_shows_nothing_loses_nothing(
    work: Path, folder: Path, shell: str, environment: dict[str, str]
) -> None:
    typed = f"'{sys.executable}' -c '{MAIN}' run in.png a -o o.png --count 2 --steps 2 --model '{folder}' --seed 3"
    ran = subprocess.run(
        ["bash", "-c", "set -o pipefail; " + shell.format(typed)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Exception ignored" not in ran.stderr
    for i, name in enumerate(("o-1.png", "o-2.png")):
        assert read_settings(name).seed == 3 + i
        with Image.open(name) as drawn:
            assert np.asarray(drawn).shape == (44, 60, 3)


def test_all_pictures_are_written_before_anything_is_printed(
    work: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(saving, "tell", lambda _: seen.append(sorted(p.name for p in work.glob("o*.png"))))
    options = ["--model", str(folder), "--steps", "2", "--count", "3"]
    ran = CliRunner().invoke(app, ["run", "in.png", "a", "-o", "o.png", *options])
    assert ran.exit_code == 0, ran.output
    assert seen == [["o-1.png", "o-2.png", "o-3.png", "old.png"]] * 3
