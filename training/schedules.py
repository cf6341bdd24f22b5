"""Which sampler, and how many steps, suit the default model: right things and styles, and seconds a picture.

    python training/schedules.py [--draws 60]

Style transfer at strength 0.6 as in evaluate.py; in bfloat16; a picture is timed alone, the median of five, in float32.
"""

import argparse
import statistics
import time
from typing import Any

import torch

from captions import things
from data import load
from evaluate import Draws, drawn, load_pipe
from features import judge, share_right
from paths import EXPORT, read_json
from sdedit.commands.settings import SUITED
from sdedit.schedulers.names import make_scheduler

CANDIDATES = (
    ("ddim", 30),
    ("ddim", 20),
    ("ddim", 14),
    ("ddim", 10),
    ("dpm++-2m", 14),
    ("dpm++-2m", 10),
    ("unipc", 10),
    ("lcm", 10),
)
GUIDANCES = (2.0, 3.0, 4.5)


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
    parser.add_argument("--draws", type=int, default=60)
    args = parser.parse_args()
    pipe, quick = (load_pipe(EXPORT, dtype, "cpu") for dtype in ("float32", "bfloat16"))
    config = pipe.scheduler.config
    learned = set(list(things())[: read_json(EXPORT / "training.json")["things"]])
    draws = Draws(*load()).transfer(args.draws, lambda item: item.name in learned)
    asked = [(draw.name, draw.style) for draw in draws]
    rows = [(name, steps, SUITED.guidance) for name, steps in CANDIDATES]
    rows += [("ddim", SUITED.steps, guidance) for guidance in GUIDANCES if guidance != SUITED.guidance]
    print("sampler steps guidance | thing style | seconds a picture")
    for name, steps, guidance in rows:
        pipe.scheduler, quick.scheduler = (make_scheduler(name, config) for _ in range(2))
        settings = {"strength": 0.6, "num_inference_steps": steps, "guidance_scale": guidance}
        alone = seconds(pipe, settings, draws[0].guide)
        found = share_right(judge().nearest(drawn(quick, draws, **settings)), asked)
        print(f"{name} {steps} {guidance} | {found['thing']:.0%} {found['style']:.0%} | {alone:.2f}", flush=True)


if __name__ == "__main__":
    main()
