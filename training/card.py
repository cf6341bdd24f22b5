"""The model card: card.md, filled with the figures that training and evaluation left in the model's folder."""

from pathlib import Path
from typing import Any

from captions import things
from data import HOLD_OUT_EVERY
from paths import HERE, read_json


def write_card(folder: Path) -> None:
    """Write README.md from `training.json` and `figures.json`."""
    text = (HERE / "card.md").read_text("utf-8")
    values = {**read_json(folder / "training.json"), "figures": rows(read_json(folder / "figures.json"))}
    values |= {
        "psnr": read_json(folder / "figures.json")["vae"]["psnr"],
        "every": HOLD_OUT_EVERY,
        "listed": len(things()),
    }
    (folder / "README.md").write_text(text.format(**values), encoding="utf-8")


def rows(figures: dict[str, Any]) -> str:
    """The table of what was measured, a row a test."""
    tests = {
        "transfer": "another style of it, strength 0.6",
        "transfer_starred": "the same, things with a star",
        "transfer_other": "the same, things not in the list",
        "strokes": "simulated strokes of it, strength 0.6",
        "words": "a white sheet, strength 1.0: words alone",
        "words_starred": "the same, things with a star",
        "seen": "another style of it, 0.6, combination seen",
        "unseen": "another style of it, 0.6, combination never seen",
    }
    goals = {"transfer": (85, 90), "strokes": (80, None), "words": (80, None)}
    lines = []
    for key, start in tests.items():
        found = figures[key]
        goal = " · ".join("–" if value is None else f"{value} %" for value in goals.get(key, (None, None)))
        lines.append(f"| {start} | {found['thing']:.0%} | {found['style']:.0%} | {found['draws']} | {goal} |")
    for key, name in (("real", "real pictures, moved and blurred"), ("random", "a picture picked at random")):
        lines.append(f"| {name} | {figures[key]['thing']:.1%} | {figures[key]['style']:.0%} | | |")
    return "\n".join(lines)
