from __future__ import annotations

from pathlib import Path

from card import NOTES, notes, rows, write_card
from paths import EXPORT

SHARES = {"thing": 0.125, "style": 0.5, "draws": 8}
FIGURES = dict.fromkeys(("transfer", "strokes", "words", "real", "random"), SHARES)


def test_the_card_in_the_package_is_that_of_its_figures(tmp_path: Path) -> None:
    for name in ("training.json", "figures.json"):
        (tmp_path / name).write_bytes((EXPORT / name).read_bytes())
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == (EXPORT / "README.md").read_text("utf-8")
    assert (EXPORT / "doodles.png").exists()


def test_a_row_for_each_test_that_was_made() -> None:
    lines = rows(FIGURES).splitlines()
    assert len(lines) == len(FIGURES)
    assert lines[0] == "| another style of it, strength 0.6 | 12 % | 50 % | 8 | 85 % · 90 % |"


def test_every_section_of_the_notes_is_there() -> None:
    assert set(notes()) == set(NOTES)
    assert all(text and "TODO" not in text for text in notes().values())


def test_the_package_stays_small() -> None:
    assert sum(path.stat().st_size for path in EXPORT.rglob("*") if path.is_file()) < 60e6
