"""Where a UNet step with guidance goes, on both sides, and the least that each part could take on this processor.

    python benchmarks/parts.py [--small]

Prints a table and writes benchmarks/results/parts.json: seconds by torch.profiler (one step after a warm one, in
bfloat16, SD 1.5's size), and operations divided by the rate at which this processor multiplies large matrices.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import sdedit
from pipeline import RESULTS, SMALL, UNET, Pair
from sdedit.models.fast.full_speed import one_run
from sdedit.models.fast.packing import PACKING, use_layouts

# The first of these that an operator, or what called it, has in its name.
PARTS = {
    "attention": ("attention",),
    "convolutions": ("convol",),
    "linear layers": ("linear", "addmm", "aten::mm", "multiply"),
}


def part_of(event: Any) -> str:
    """The part that an operator belongs to, by the names of what called it."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return next((part for part, words in PARTS.items() if any(w in n for n in names for w in words)), "the rest")


@torch.no_grad()
def seconds(step: Callable[[], Any]) -> dict[str, float]:
    """Of each part of a step."""
    step()
    with profile() as seen:
        step()
    found = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in seen.events():
        found[part_of(event)] += event.self_cpu_time_total / 1e6
    return found


def operations(kind: Any, batch: int, small: bool, side: int) -> dict[str, float]:
    """Floating-point operations of each part of a step, counted without any numbers."""
    with torch.device("meta"):
        unet = kind.from_config(UNET | (SMALL if small else {}))
        given = torch.randn(batch, 4, side // 8, side // 8), torch.tensor(500), torch.randn(2, 77, 768)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*given)
    counts = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    return {p: sum(f for n, f in counts.items() if any(w in n for w in words)) for p, words in KINDS.items()}


KINDS = {
    "attention": ("attention", "bmm", "baddbmm"),
    "convolutions": ("convolution",),
    "linear layers": ("aten.mm", "aten.addmm", "aten::mm", "aten::addmm"),
}


@torch.no_grad()
def rate() -> float:
    """Operations a second of the best of ten products of large matrices in bfloat16, packed as a run packs them."""
    layer, x = torch.nn.Linear(4096, 4096).bfloat16(), torch.randn(4096, 4096).bfloat16()
    times = []
    with PACKING.installed(layer), use_layouts({}):
        for _ in range(10):
            began = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - began)
    return 2 * 4096**3 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="try the script out")
    small = parser.parse_args().small
    pair = Pair("cpu", torch.bfloat16, 1, small)
    found: dict[str, Any] = {"diffusers": seconds(pair.their_step)}
    with one_run(pair.ours.unet):
        found["sdedit"] = seconds(pair.our_step)
        pair.ours.compile()
        found["sdedit, compiled"] = seconds(pair.our_step)
    fastest = rate()
    for name, kind, batch in (
        ("diffusers", diffusers.UNet2DConditionModel, 2),
        ("sdedit", sdedit.UNet2DConditionModel, 1),  # which is told that both halves are the same
    ):
        counted = operations(kind, batch, small, pair.side)
        found[f"least, {name}"] = {part: count / fastest for part, count in counted.items()}
    for name, parts in found.items():
        print(f"{name:18}", {part: round(value, 2) for part, value in parts.items()})
    found["operations a second"] = fastest
    if not small:
        Path(RESULTS / "parts.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
