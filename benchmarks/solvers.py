"""Speed against quality: each solver on the default model, with few steps and many, against a 200-step answer.

    python benchmarks/solvers.py

writes docs/solvers.png (a picture from each, its time and distance), docs/solvers-plot.png (distance against the
number of UNet calls) and benchmarks/results/solvers.json. All run `exact_steps` at strength 0.7 from the same noise.
The 200-step answer is DDIM's; stochastic solvers (marked *) add noise of their own on the way, so they end at other
pictures by nature and their distance does not go to zero.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

from sdedit import StableDiffusionImg2ImgPipeline
from sdedit.apps.sheets import contact_sheet
from sdedit.schedulers.names import make_scheduler

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
NAMES = (
    "ddim",
    "ddpm",
    "pndm",
    "euler",
    "euler-a",
    "lms",
    "heun",
    "dpm2",
    "dpm2-a",
    "dpm++-2m",
    "dpm++-2m-karras",
    "dpm++-2m-sde",
    "dpm++-2s",
    "dpm++-sde",
    "deis",
    "unipc",
    "lcm",
    "tcd",
)
STOCHASTIC = {"ddpm", "euler-a", "dpm2-a", "dpm++-2m-sde", "dpm++-sde", "lcm"}
STEPS = (4, 6, 10, 16, 25)
SHOWN = 10
GUIDES = {"cat": "cat face, 3d", "apple": "red apple, 3d", "house": "house, 3d", "boat": "sailboat, 3d"}
STRENGTH, GUIDANCE = 0.7, 3.0


def draw(pipe: Any, guides: list[Image.Image], steps: int) -> tuple[Any, float, int]:
    """Pictures (B, H, W, 3) in [0, 1], seconds, and UNet calls."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(guides))]
    began = time.perf_counter()
    pictures = pipe(
        list(GUIDES.values()),
        guides,
        strength=STRENGTH,
        guidance_scale=GUIDANCE,
        num_inference_steps=steps,
        exact_steps=True,
        generator=generators,
        output_type="np",
    ).images
    return pictures, time.perf_counter() - began, pipe.num_timesteps


def rms(a: Any, b: Any) -> float:
    """Root of the mean squared difference of pixels in [0, 1]."""
    return float(np.sqrt(np.square(a - b).mean()))


def measure() -> tuple[dict[str, Any], list[Image.Image]]:
    """Figures for each solver and number of steps, and the first guide's picture at SHOWN steps."""
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    guides = [Image.open(ROOT / "examples" / f"{name}.png").convert("RGB").resize((256, 256)) for name in GUIDES]
    pipe.scheduler = make_scheduler("ddim", config)
    answer = draw(pipe, guides, 200)[0]
    results: dict[str, Any] = {}
    shown = [Image.fromarray((answer[0] * 255).round().astype(np.uint8))]
    for name in NAMES:
        pipe.scheduler = make_scheduler(name, config)
        rows = []
        for steps in STEPS:
            runs = [draw(pipe, guides, steps) for _ in range(3)]
            seconds = statistics.median(run[1] for run in runs) / len(guides)
            rows.append({"steps": steps, "unet_calls": runs[0][2], "rms": rms(runs[0][0], answer), "seconds": seconds})
            if steps == SHOWN:
                shown.append(Image.fromarray((runs[0][0][0] * 255).round().astype(np.uint8)))
        results[name] = rows
        print(f"{name:18}", *(f"{row['steps']}: {row['rms']:.4f} {row['seconds']:.2f} s " for row in rows), flush=True)
    return results, shown


def plot(results: dict[str, Any]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    for i, (name, rows) in enumerate(results.items()):
        style = {
            "color": f"C{i % 10}",
            "marker": "os^"[i // 10],
            "markersize": 4,
            "linestyle": "--" if name in STOCHASTIC else "-",
        }
        axes[0].plot([row["unet_calls"] for row in rows], [row["rms"] for row in rows], label=name, **style)
        axes[1].plot([row["seconds"] for row in rows], [row["rms"] for row in rows], **style)
    axes[0].set(xlabel="UNet calls", ylabel="RMS distance to the 200-step answer", xscale="log", yscale="log")
    axes[1].set(xlabel="seconds a picture, batch of 4, this machine", xscale="log", yscale="log")
    axes[1].legend(*axes[0].get_legend_handles_labels(), fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "solvers-plot.png", dpi=90)


def main() -> None:
    results, shown = measure()
    at = {name: next(row for row in rows if row["steps"] == SHOWN) for name, rows in results.items()}
    labels = ["200-step answer"]
    labels += [f"{n}{'*' * (n in STOCHASTIC)}\n{row['seconds']:.2f} s  {row['rms']:.3f}" for n, row in at.items()]
    contact_sheet(shown, labels, columns=5).save(ROOT / "docs" / "solvers.png")
    plot(results)
    path = ROOT / "benchmarks" / "results" / "solvers.json"
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
