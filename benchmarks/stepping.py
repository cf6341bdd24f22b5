"""What stepping costs beside the UNet: 1,000 steps of each scheduler on 64×64 latents, ours and diffusers' in turn.

    python benchmarks/stepping.py            prints a table and writes benchmarks/results/stepping.json

A thousand steps are 20 runs of 50, `set_timesteps` included, on one thread; the figures are medians over rounds that
alternate between the two, in CPU time, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch

from sdedit import schedulers
from sdedit.schedulers.names import CLASS_NAMES

RUNS, STEPS = 20, 50
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def thousand_steps(scheduler: Any) -> float:
    """CPU seconds for RUNS runs of STEPS steps, with a prediction that costs nothing."""
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(1, 4, 64, 64, generator=generator)
    began = time.process_time()
    for _ in range(RUNS):
        sample = torch.ones(1, 4, 64, 64)
        scheduler.set_timesteps(STEPS)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        for t in scheduler.timesteps:
            scheduler.scale_model_input(sample, t)
            sample = scheduler.step(prediction, t, sample, return_dict=False)[0]
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {}
    print(f"{'milliseconds a step':34} {'sdedit':>8} {'diffusers':>10} {'ratio':>6}")
    for name in CLASS_NAMES:
        pair = [getattr(module, name)(**SCHEDULE) for module in (schedulers, diffusers)]
        times: tuple[list[float], list[float]] = ([], [])
        for one in pair:
            thousand_steps(one)
        for _ in range(rounds):
            for one, kept in zip(pair, times, strict=True):
                kept.append(thousand_steps(one) / RUNS / STEPS * 1000)
        ours, theirs = map(statistics.median, times)
        results[name] = {"sdedit_ms": ours, "diffusers_ms": theirs, "ratio": ours / theirs}
        print(f"{name:34} {ours:8.3f} {theirs:10.3f} {ours / theirs:6.2f}", flush=True)
    path = Path(__file__).parent / "results" / "stepping.json"
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
