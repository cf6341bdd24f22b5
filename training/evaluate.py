"""Measure a model folder, write what was found into it, and its model card.

    python training/evaluate.py [FOLDER]

The folder is src/sdedit/default_model unless another is named. Figures go to its figures.json, what becomes of
the doodles in examples/ to its doodles.png, and the card, made from card.md, to its README.md. Every draw has its own
seed, so the same folder gives the same figures on the same machine.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from captions import UNSEEN_STYLE, starred, things, unseen
from card import write_card
from data import SIZE, STYLES, Item, load, on_ground
from doodles import doodle_sheet
from features import Judge, find_themselves, share_right
from paths import EXPORT, read_json, write_json
from sdedit import StableDiffusionImg2ImgPipeline
from sdedit.commands.options import SUITED
from sdedit.strokes import simulate_strokes
from train_vae import pools, psnr

BRUSH = 11  # side of the median filter: the paper's 23 pixels of 256 at our size
BATCH = 20


@dataclass(frozen=True)
class Draw:
    """One picture to draw: from which guide, with which words, and what it shall be nearest to."""

    guide: Image.Image
    name: str
    style: str

    @property
    def prompt(self) -> str:
        return f"{self.name}, {self.style}"


class Draws:
    """Makes draws of random pictures, of names that a rule keeps."""

    def __init__(self, pictures: np.ndarray, items: list[Item]) -> None:
        self.pictures, self.items = pictures, items
        self.rows: dict[str, list[int]] = {}
        for row, item in enumerate(items):
            self.rows.setdefault(item.name, []).append(row)

    def image(self, row: int) -> Image.Image:
        return Image.fromarray((on_ground(self.pictures[row]) * 255).round().astype(np.uint8))

    def targets(self, count: int, keep: Callable[[Item], bool]) -> Iterator[tuple[Item, int, np.random.Generator]]:
        """`count` random pictures that `keep` keeps and that are there in another style: their item and row."""
        rng = np.random.default_rng(11)
        kept = [row for row, item in enumerate(self.items) if keep(item) and len(self.rows[item.name]) > 1]
        for row in rng.choice(kept, count):
            yield self.items[row], int(row), rng

    def transfer(self, count: int, keep: Callable[[Item], bool]) -> list[Draw]:
        """The same thing in another style is the guide."""
        draws = []
        for item, row, rng in self.targets(count, keep):
            other = int(rng.choice([r for r in self.rows[item.name] if r != row]))
            draws.append(Draw(self.image(other), item.name, item.style))
        return draws

    def strokes(self, count: int, keep: Callable[[Item], bool]) -> list[Draw]:
        """A stroke painting of the picture is the guide."""
        return [
            Draw(simulate_strokes(self.image(row), kernel=BRUSH), item.name, item.style)
            for item, row, _ in self.targets(count, keep)
        ]

    def words(self, count: int, keep: Callable[[Item], bool]) -> list[Draw]:
        """A white sheet is the guide."""
        sheet = Image.new("RGB", (SIZE, SIZE), "white")
        return [Draw(sheet, item.name, item.style) for item, _, _ in self.targets(count, keep)]


def drawn(pipe: Any, draws: list[Draw], strength: float, **settings: Any) -> list[np.ndarray]:
    """The pictures, (128, 128, 3) in [0, 1] each; draw i has seed i."""
    pictures: list[np.ndarray] = []
    for start in range(0, len(draws), BATCH):
        part = draws[start : start + BATCH]
        pictures += pipe(
            [draw.prompt for draw in part],
            [draw.guide for draw in part],
            strength=strength,
            generator=[torch.Generator().manual_seed(start + n) for n in range(len(part))],
            output_type="np",
            **settings,
        ).images
    return [np.asarray(picture, np.float32) for picture in pictures]


def measure(pipe: Any, first_new: int = 0, count: int = 200) -> dict[str, Any]:
    """All figures of a pipeline.

    Args:
        first_new: How many things of things.txt an earlier training has seen in all styles: the measure of unseen
            combinations passes over them.
    """
    pictures, items = load()
    judge, make = Judge(pictures, items), Draws(pictures, items)
    new = set(list(things())[first_new:])
    half = max(count // 2, 1)

    def listed(item: Item) -> bool:
        return item.name in things()

    tests: dict[str, tuple[list[Draw], float]] = {
        "transfer": (make.transfer(count, listed), 0.6),
        "transfer_starred": (make.transfer(half, lambda item: item.name in starred()), 0.6),
        "transfer_other": (make.transfer(half, lambda item: not listed(item)), 0.6),
        "strokes": (make.strokes(count, listed), 0.6),
        "words": (make.words(count, listed), 1.0),
        "words_starred": (make.words(half, lambda item: item.name in starred()), 1.0),
    }
    combined = {"seen": False, "unseen": True}
    for key, held_out in combined.items():

        def keep(item: Item, held_out: bool = held_out) -> bool:
            return item.name in new and item.style == UNSEEN_STYLE and unseen(item) == held_out

        tests[key] = (make.transfer(half, keep), 0.6)
    settings = {"num_inference_steps": SUITED.steps, "guidance_scale": SUITED.guidance}
    figures: dict[str, Any] = {
        "settings": {**settings, "scheduler": type(pipe.scheduler).__name__},
        "vae": {"psnr": psnr(pipe.vae, pictures, pools(items)[2]), "pictures": len(pools(items)[2])},
        "real": find_themselves(pictures, items),
        "random": {"thing": chance(items, listed), "style": 1 / len(STYLES)},
    }
    for key, (draws, strength) in tests.items():
        found = judge.nearest(drawn(pipe, draws, strength, **settings))
        figures[key] = share_right(found, [(draw.name, draw.style) for draw in draws])
        print(key, figures[key], flush=True)
    return figures


def chance(items: list[Item], keep: Callable[[Item], bool]) -> float:
    """How often a picture picked at random from all has the name of a random kept one."""
    names = [item.name for item in items]
    count = {name: names.count(name) for name in set(names)}
    return float(np.mean([count[item.name] for item in items if keep(item)])) / len(items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=EXPORT)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(args.folder).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    started = time.monotonic()
    training = args.folder / "training.json"
    figures = measure(pipe, read_json(training)["things_before"] if training.exists() else 0, args.draws)
    write_json(figures, args.folder / "figures.json")
    doodle_sheet(pipe).save(args.folder / "doodles.png")
    write_card(args.folder)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
