"""The model card: card.md, filled with the figures that training and evaluation left in the model's folder."""

from pathlib import Path
from typing import Any

from captions import starred
from data import HOLD_OUT_EVERY
from paths import HERE, read_json

NOTES = ("doodles", "combinations", "speed", "limits")  # what a person who looked at the pictures says, in notes.md


def write_card(folder: Path) -> None:
    """Write README.md from `training.json`, `figures.json` and the sections of notes.md."""
    history, figures = read_json(folder / "training.json"), read_json(folder / "figures.json")
    values = {
        **history,
        **notes(),
        "total": history["vae"] + history["unet"] + history["text"],
        "psnr": figures["vae"]["psnr"],
        "held_out": figures["vae"]["pictures"],
        "tiny_psnr": figures["tiny_vae"]["psnr"],
        "tiny_own": figures["tiny_vae"]["own"],
        "every": HOLD_OUT_EVERY,
        "gallery": figures["gallery"],
        "dtype": figures["settings"]["dtype"],
        "figures": rows(figures),
        "starred": len(starred()),
    }
    text = (HERE / "card.md").read_text("utf-8").format(**values)
    (folder / "README.md").write_text(text, encoding="utf-8")


def notes() -> dict[str, str]:
    """The sections of notes.md by their headings."""
    parts = (HERE / "notes.md").read_text("utf-8").split("\n## ")[1:]
    found = {part.partition("\n")[0].strip(): part.partition("\n")[2].strip() for part in parts}
    if set(found) != set(NOTES):
        raise ValueError(f"training/notes.md has the sections {sorted(found)}; expected {sorted(NOTES)}")
    return found


def rows(figures: dict[str, Any]) -> str:
    """The table of what was measured, a row a test."""
    tests = {
        "transfer": "another style of it, strength 0.6",
        "transfer_guide": "these guides themselves, nothing drawn",
        "transfer_shown": "the same, without what was kept from training",
        "transfer_rest": "another style, the other names of the list",
        "transfer_other": "another style, things that it was never shown",
        "strokes": "simulated strokes of it, strength 0.6",
        "strokes_guide": "these guides themselves, nothing drawn",
        "strokes_rest": "simulated strokes, the other names of the list",
        "words": "a white sheet, strength 1.0: words alone",
        "words_rest": "words alone, the other names of the list",
        "seen": "another style than twemoji, to twemoji, names trained in it",
        "unseen": "the same, names kept from training in it",
    }
    goals = {"transfer": (85, 90), "transfer_shown": (85, 90), "strokes": (80, None), "words": (80, None)}
    lines = []
    for key, start in tests.items():
        if key not in figures:
            continue
        found = figures[key]
        goal = " · ".join("–" if value is None else f"{value} %" for value in goals.get(key, (None, None)))
        lines.append(f"| {start} | {percent(found['thing'])} | {percent(found['style'])} | {found['draws']} | {goal} |")
    for key, name in (("real", "a real picture, moved and blurred"), ("random", "a picture picked at random")):
        lines.append(f"| {name} | {100 * figures[key]['thing']:.3g} % | {percent(figures[key]['style'])} | | |")
    return "\n".join(lines)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
