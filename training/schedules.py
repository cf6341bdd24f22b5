"""Which sampler, and how many steps, suit the default model: right things and styles, and seconds a picture.

    python training/schedules.py [FOLDER] [--draws 100]

Guides in another style, simulated strokes and words alone as in evaluate.py, of the things that were taught most, at
the strength that suits the model. Drawn in bfloat16; a picture is timed alone, the median of five, in float32 and
bfloat16.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from captions import starred, unseen
from data import load
from evaluate import Draws, drawn, load_pipe
from features import judge, share_right
from paths import EXPORT
from sdedit.commands.settings import SUITED
from sdedit.schedulers.names import make_scheduler

CANDIDATES = (  # sampler, steps, do all of them run (exact_steps), guidance
    ("ddim", 20, False, 3.0),
    ("ddim", 20, True, 3.0),
    ("ddim", 8, True, 3.0),
    ("ddim", 6, True, 3.0),
    ("ddim", 5, True, 3.0),
    ("ddim", 4, True, 3.0),
    ("ddim", 3, True, 3.0),
    ("dpm++-2m", 6, True, 3.0),
    ("dpm++-2m", 4, True, 3.0),
    ("unipc", 6, True, 3.0),
    ("unipc", 4, True, 3.0),
    ("ddim", 5, True, 2.0),
    ("ddim", 5, True, 4.0),
)


def seconds(pipe: Any, settings: dict[str, Any], guide: Any) -> float:
    """Median of five pictures, alone."""
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        pipe("cat face, 3d", guide, generator=torch.Generator().manual_seed(0), **settings)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=EXPORT)
    parser.add_argument("--draws", type=int, default=100)
    args = parser.parse_args()
    pipes = [load_pipe(args.folder, dtype, "cpu") for dtype in ("float32", "bfloat16")]
    config, make = pipes[0].scheduler.config, Draws(*load())
    kinds = (
        (make.transfer(args.draws, lambda i: i.name in starred() and not unseen(i.name, i.style)), SUITED.strength),
        (make.strokes(args.draws, lambda i: i.name in starred()), SUITED.strength),
        (make.words(args.draws, lambda i: i.name in starred()), 1.0),
    )
    print("sampler steps exact guidance | another style | strokes | words alone | seconds in float32, bfloat16")
    for name, steps, exact, guidance in CANDIDATES:
        settings = {"num_inference_steps": steps, "exact_steps": exact, "guidance_scale": guidance}
        for pipe in pipes:
            pipe.scheduler = make_scheduler(name, config)
        cells = [f"{name} {steps} {'exact' if exact else ''} {guidance:g}"]
        for draws, strength in kinds:
            found = judge().nearest(drawn(pipes[1], draws, strength, **settings))
            right = share_right(found, [(draw.name, draw.style) for draw in draws])
            cells.append(f"{right['thing']:.0%} {right['style']:.0%}")
        taken = (seconds(pipe, settings | {"strength": SUITED.strength}, kinds[0][0][0].guide) for pipe in pipes)
        print(" | ".join([*cells, ", ".join(f"{value:.2f}" for value in taken)]), flush=True)


if __name__ == "__main__":
    main()
