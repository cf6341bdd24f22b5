"""The default model on JAX beside PyTorch, in one run, alternating: the first call, later calls, a new strength.

python benchmarks/on_jax.py [--calls 5] [--dtype float32]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image

from sdedit import FlaxStableDiffusionImg2ImgPipeline, StableDiffusionImg2ImgPipeline

APPLE = Path(__file__).parents[1] / "examples" / "apple.png"
PROMPT, STRENGTH, OTHERS = "red apple, 3d", 0.65, (0.3, 0.5, 0.8)
SETTINGS = {"num_inference_steps": 20, "guidance_scale": 3.0}


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def on_jax(dtype: str, image: Image.Image) -> Callable[[float], Any]:
    pipe, params = FlaxStableDiffusionImg2ImgPipeline.from_pretrained(dtype=jnp.dtype(dtype))
    prompt_ids, pixels = pipe.prepare_inputs(PROMPT, image)
    return lambda strength: pipe(prompt_ids, pixels, params, 0, strength=strength, **SETTINGS).images


def on_torch(dtype: str, image: Image.Image) -> Callable[[float], Any]:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(torch_dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)

    def run(strength: float) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPT, image, strength=strength, generator=generator, output_type="np", **SETTINGS).images

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    image = Image.open(APPLE).convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)

    runs: dict[str, Callable[[float], Any]] = {}
    rows: dict[str, list[float]] = {}
    for name, make in (("JAX", on_jax), ("PyTorch", on_torch)):
        load = seconds(lambda: runs.__setitem__(name, make(arguments.dtype, image)))  # noqa: B023 (called at once)
        rows[name] = [load, seconds(lambda: runs[name](STRENGTH))]  # noqa: B023
    later: dict[str, list[float]] = {name: [] for name in runs}
    new: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.calls):
        for name, run in runs.items():
            later[name].append(seconds(lambda: run(STRENGTH)))  # noqa: B023
    for strength in OTHERS:
        steps = int(SETTINGS["num_inference_steps"] * strength)
        for name, run in runs.items():
            new[name].append(seconds(lambda: run(strength)) / steps)  # noqa: B023
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {arguments.dtype}")
    print(f"jax {version('jax')} on {jax.devices()[0].platform}, torch {version('torch')}")
    print("| | load | first call | later calls (median) | a step, at strengths new to it |\n|---|---|---|---|---|")
    for name, (load, first) in rows.items():
        steps = np.mean(new[name])
        print(f"| {name} | {load:.1f} s | {first:.1f} s | {statistics.median(later[name]):.2f} s | {steps:.3f} s |")


if __name__ == "__main__":
    main()
