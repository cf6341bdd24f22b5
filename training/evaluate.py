"""Measure a model folder, write what was found into it, and its model card.

    python training/evaluate.py [FOLDER]

The folder is src/sdedit/default_model unless another is named. Figures go to its figures.json, what becomes of
the doodles in examples/ to its doodles.png, and the card, made from card.md, to its README.md. Every draw has its own
seed, so the same folder gives the same figures on the same machine.
"""

import argparse
import time
from collections import Counter
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
from features import judge, share_right
from paths import EXPORT, read_json, write_json
from sdedit import AutoencoderTiny, StableDiffusionImg2ImgPipeline
from sdedit.apps.strokes import simulate_strokes
from sdedit.commands.settings import SUITED
from train_vae import pools, psnr

BRUSH = 23  # side of the median filter, as in the paper
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


def drawn(pipe: Any, draws: list[Draw], strength: float, **settings: Any) -> Iterator[np.ndarray]:
    """The pictures, (256, 256, 3) in [0, 1] each; draw i has seed i."""
    for start in range(0, len(draws), BATCH):
        part = draws[start : start + BATCH]
        yield from pipe(
            [draw.prompt for draw in part],
            [draw.guide for draw in part],
            strength=strength,
            generator=[torch.Generator().manual_seed(start + n) for n in range(len(part))],
            output_type="np",
            **settings,
        ).images.astype(np.float32)


def tests(make: Draws, learned: list[str], count: int) -> dict[str, tuple[list[Draw], float]]:
    """What is drawn, and at which strength.

    Args:
        learned: The listed names that the model was trained on; those with a star were what it was taught most.
    """
    half, known = max(count // 2, 1), set(learned)
    most = known & starred()

    def taught(item: Item) -> bool:
        return item.name in most

    def shown(item: Item) -> bool:
        return taught(item) and not unseen(item.name, item.style)

    def rest(item: Item) -> bool:
        return item.name in known - most

    return {
        "transfer": (make.transfer(count, taught), 0.6),
        "transfer_shown": (make.transfer(count, shown), 0.6),
        "transfer_rest": (make.transfer(half, rest), 0.6),
        "transfer_other": (make.transfer(half, lambda item: item.name not in known and item.held_out), 0.6),
        "strokes": (make.strokes(count, taught), 0.6),
        "strokes_rest": (make.strokes(half, rest), 0.6),
        "words": (make.words(count, taught), 1.0),
        "words_rest": (make.words(half, rest), 1.0),
        "seen": (
            make.transfer(half, lambda item: shown(item) and item.style == UNSEEN_STYLE),
            0.6,
        ),
        "unseen": (make.transfer(half, lambda item: taught(item) and unseen(item.name, item.style)), 0.6),
    }


def measure(pipe: Any, history: dict[str, Any], count: int) -> dict[str, Any]:
    """What a pipeline's pictures are nearest to; `history` is its training.json."""
    pictures, items = load()
    learned = list(things())[: history["things"]]
    settings = {
        "num_inference_steps": SUITED.steps,
        "exact_steps": SUITED.exact_steps,
        "guidance_scale": SUITED.guidance,
    }
    dtype = str(pipe.dtype).removeprefix("torch.")
    figures: dict[str, Any] = {
        "settings": {**settings, "scheduler": type(pipe.scheduler).__name__, "dtype": dtype},
        "gallery": len(items),
        "random": {"thing": chance(items, set(learned) & starred()), "style": 1 / len(STYLES)},
        "real": judge().real,
    }
    for key, (draws, strength) in tests(Draws(pictures, items), learned, count).items():
        found = judge().nearest(drawn(pipe, draws, strength, **settings))
        asked = [(draw.name, draw.style) for draw in draws]
        figures[key] = share_right(found, asked)
        if strength < 1:
            figures[f"{key}_guide"] = guides_alone(draws)
        print(key, figures[key], figures.get(f"{key}_guide"), flush=True)
    return figures


def guides_alone(draws: list[Draw]) -> dict[str, float]:
    """What the guides themselves are nearest to: the score of a model that changes nothing."""
    found = judge().nearest(np.asarray(draw.guide, np.float32) / 255 for draw in draws)
    return share_right(found, [(draw.name, draw.style) for draw in draws])


def chance(items: list[Item], names: set[str]) -> float:
    """How often a random one of all pictures has the name of a random one of those with these names."""
    count = Counter(item.name for item in items)
    return float(np.mean([count[item.name] for item in items if item.name in names])) / len(items)


def load_pipe(folder: Path, dtype: str, device: str) -> Any:
    """The pipeline of a model folder, without progress bars."""
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=EXPORT)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="to draw in")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    started = time.monotonic()
    pipe, other = (load_pipe(args.folder, dtype, args.device) for dtype in ("float32", args.dtype))
    pictures, items = load()
    held_out = pools(items)[2]
    tiny = AutoencoderTiny.from_pretrained(args.folder, subfolder="tiny_vae").to(args.device)
    figures = {
        "vae": {"psnr": psnr(pipe.vae, pictures, held_out), "pictures": len(held_out)},
        "tiny_vae": {"psnr": psnr(tiny, pictures, held_out, pipe.vae), "own": psnr(tiny, pictures, held_out)},
    }
    print(figures, flush=True)
    figures |= measure(other, read_json(args.folder / "training.json"), args.draws)
    write_json(figures, args.folder / "figures.json")
    doodle_sheet(pipe).save(args.folder / "doodles.png")
    write_card(args.folder)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
